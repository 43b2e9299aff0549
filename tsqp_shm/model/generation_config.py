"""What a model folder's generation_config.json says of how its author wants it sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsqp_shm.errors import UnsupportedModel
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.json_fields import brief, read_model_json

GENERATION_CONFIG_FILE = "generation_config.json"
# What transformers takes where a field is absent or null, and the file asks for sampling.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
# Of what changes the tokens and is not done here, the values that change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "typical_p": (1, None),
    "top_h": (None,),
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
    "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "encoder_repetition_penalty": (1, None),
    "num_beams": (1, None),
    "penalty_alpha": (None, 0),
    "guidance_scale": (1, None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "dola_layers": (None,),
}


def sampling_fields(folder: Path | ModelFiles) -> dict[str, Any]:
    """Returns the sampling fields as the file has them, for whoever gives none of his own: `temperature` is 0 unless it
    asks for sampling. Values are not looked at yet. Without the file: {}.

    Raises:
        ModelFileError: the file is not a JSON object.
        UnsupportedModel: a field asks for tokens that are not sampled so here.
    Source: transformers' `GenerationMixin`: without `do_sample` the likeliest token is taken, penalties applied. Its
        min_p comes last of all filters, ours before top_k.
    """
    files = ModelFiles.of(folder)
    if not files.has(GENERATION_CONFIG_FILE):
        return {}
    config = read_model_json(files, GENERATION_CONFIG_FILE)
    for field, neutral in _NEUTRAL.items():
        if config.get(field, neutral[0]) not in neutral:
            raise UnsupportedModel(field, brief(config[field]), "sampling as SamplingParams can say it; give some")
    fields: dict[str, Any] = {"temperature": 0.0}
    if config.get("do_sample"):
        fields = {name: default if config.get(name) is None else config[name] for name, default in _DEFAULTS.items()}
    if config.get("repetition_penalty") is not None:
        fields["repetition_penalty"] = config["repetition_penalty"]
    return fields
