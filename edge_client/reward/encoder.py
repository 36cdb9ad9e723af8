"""Another trunk of reward models: a pretrained encoder, as the paper's DistilBERT, from a folder.

It reads prompt and response as a pair of texts. A response's features are the first token's last
state, the mean of the response's last states, and the logarithm of how many these are: as many as
``reward_heads.feature_count`` of its width. It has no features of a state, and so no critics.
Shape letters: N responses, B batch, T tokens of the longest of a batch, D width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from device_profiles.reward_heads import feature_count
from edge_client.quiet import import_quietly
from quantization.errors import BaseModelError, HubUnavailableError

_BATCH = 16
_MOST_TOKENS = 512
_POOLER = "pooler."  # of BERT: made for another task, not read here


class Encoder:
    """A frozen encoder in fp32, on the CPU.

    Args:
        name: A folder, or a hub id such as ``distilbert-base-uncased``.
        sha256: Of what is in it, for whoever asks later.

    Raises:
        BaseModelError: If it is no encoder, damaged, or without a tokenizer.
        HubUnavailableError: If it is a hub id and the hub does not answer.
    """

    def __init__(self, name: str, sha256: str = "") -> None:
        import_quietly()
        self.sha256 = sha256
        local = Path(name).expanduser().is_dir()
        source = str(Path(name).expanduser()) if local else name
        if local and not (Path(source) / "config.json").is_file():
            # the library would guess what it is by the folder's name
            raise BaseModelError(
                f"encoder '{source}' has no config.json; give the folder of an encoder"
            )
        self.name = Path(name).expanduser().resolve().name if local else name
        _check_is_encoder(_read("configuration", source, local=local))
        self._tokenizer = _read("tokenizer", source, local=local)
        self._tokenizer.padding_side = "right"  # places are counted from the left
        self._model = _read("weights", source, local=local)
        self._model.requires_grad_(False)
        self._model.eval()
        self.kind = str(self._model.config.model_type)
        self.width = int(self._model.config.hidden_size)
        positions = int(getattr(self._model.config, "max_position_embeddings", _MOST_TOKENS))
        self._most_tokens = min(positions, self._tokenizer.model_max_length, _MOST_TOKENS)

    def response_features(self, texts: Sequence[tuple[str, str]]) -> Tensor:
        """Return the features of responses to prompts.

        Where the two are too long together, the longer of them loses its end.

        Args:
            texts: (prompt, response). Length N.

        Returns:
            Shape (N, F).
        """
        found = torch.empty(len(texts), feature_count(self.width))
        encoded = [self._encoded(prompt, response) for prompt, response in texts]
        order = sorted(range(len(texts)), key=lambda i: (len(encoded[i].input_ids), i))
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            found[batch] = self._batch_features([encoded[i] for i in batch])
        return found

    def _encoded(self, prompt: str, response: str) -> Any:
        return self._tokenizer(
            prompt, response, truncation="longest_first", max_length=self._most_tokens
        )

    @torch.no_grad()
    def _batch_features(self, encoded: Sequence[Any]) -> Tensor:
        padded = self._tokenizer.pad([dict(e) for e in encoded], return_tensors="pt")
        states = self._model(**padded).last_hidden_state  # (B, T, D)
        rows = []
        for own, encoding in zip(states, encoded, strict=True):
            answer = [i for i, part in enumerate(encoding.sequence_ids()) if part == 1]
            read = own[answer] if answer else own[:1]
            normal = [
                torch.nn.functional.layer_norm(vector, vector.shape)
                for vector in (own[0], read.mean(0))
            ]
            rows.append(torch.cat([*normal, torch.tensor([len(answer) + 1.0]).log()]))
        return torch.stack(rows)


def _read(what: str, source: str, *, local: bool) -> Any:
    """Return an encoder's configuration, tokenizer or weights.

    Raises:
        BaseModelError: If it cannot be read.
        HubUnavailableError: If the hub does not answer.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        if what == "configuration":
            return AutoConfig.from_pretrained(source, local_files_only=local)
        if what == "tokenizer":
            return AutoTokenizer.from_pretrained(source, local_files_only=local, use_fast=True)
        model, notes = AutoModel.from_pretrained(
            source,
            local_files_only=local,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as err:
        if not local and isinstance(err, (OSError, HfHubHTTPError)):
            raise HubUnavailableError(
                f"encoder '{source}' is no folder here, and could not be fetched from the hub "
                f"({type(err).__name__}); connect to it, or give the folder of an encoder"
            ) from err
        raise BaseModelError(
            f"encoder '{source}': its {what} cannot be read ({_line(err)}); give the folder of an "
            "encoder with config.json, model.safetensors and its tokenizer"
        ) from err
    absent = sorted(key for key in notes["missing_keys"] if not key.startswith(_POOLER))
    if absent:
        raise BaseModelError(
            f"encoder '{source}' lacks {len(absent)} of its tensors, '{absent[0]}' among them; "
            "give a whole checkpoint"
        )
    return model


def _check_is_encoder(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    generates = config.is_encoder_decoder or config.is_decoder
    if generates or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise BaseModelError(
            f"a '{config.model_type}' is no encoder; give one, such as distilbert-base-uncased or "
            "the folder of a BERT, or leave it out: the frozen base is the trunk then"
        )


def _line(err: Exception) -> str:
    return f"{str(err).strip()}\n".splitlines()[0][:200]
