"""Small trainable modules on a frozen base: global bottleneck adapters and personal LoRA."""
