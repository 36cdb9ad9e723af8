"""Alignment on the device: PPO with a critic an objective, and its ablations RLOO and DPO."""
