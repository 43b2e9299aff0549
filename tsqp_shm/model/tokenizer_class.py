"""What the class of a tokenizer changes of its tokenizer.json, where tokenizer_config.json names one that rebuilds it.

Transformers' `LlamaTokenizer`, `Qwen2Tokenizer` and `GPT2Tokenizer` take the vocabulary and the merges from the file
and build the rest themselves. What the checkpoint's author has written in tokenizer.json is followed instead, as long
as he has written nothing else: with `legacy` or `add_prefix_space` for the first of them, and where an
`add_prefix_space` for the others contradicts the file, the ids are those of the class.

Source: transformers' `AutoTokenizer.from_pretrained`, for the choice, `TokenizersBackend` and the three classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from tsqp_shm.errors import ModelFileError, UnsupportedModel
from tsqp_shm.model.added_tokens import CONFIG_FILE, NAMED, TokenizerConfig
from tsqp_shm.model.files import ModelFiles
from tsqp_shm.model.json_fields import brief, read_model_json

# They take tokenizer.json as it is.
_GENERIC = ("", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend")
_LLAMA, _QWEN2, _GPT2 = "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"
_END = "<|endoftext|>"
# Tokens that a class has where no file names them.
_DEFAULTS: Mapping[str, Mapping[str, str]] = {
    _LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    _QWEN2: {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    _GPT2: {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoXTokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": "<|padding|>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "sep_token": "<SEP>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
}
# What other classes build from a field, by its name in a normalizer of tokenizer.json.
_OF_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Classes for networks of other kinds: they add tokens around a text, or do not read tokenizer.json.
_OF_OTHER_NETWORKS = """
    Albert Bart Barthez Bartpho Bert BertJapanese Bertweet BigBird BioGpt Blenderbot BlenderbotSmall ByT5 CLIP CTRL
    Camembert Canine Clvp Cpm CpmAnt DPRQuestionEncoder Deberta DebertaV2 Dia DistilBert Electra Esm Esmc FNet FSMT
    Flaubert Funnel GPTNeoXJapanese Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert MBart MBart50 MPNet
    MarkupLM Mgpstr MobileBert Mvp MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus Perceiver Phobert ProphetNet Rag Reformer
    RemBert RoCBert RoFormer Roberta SeamlessM4T Splinter T5 Tapas Udop VideoPrism Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC
    Whisper XGLM XLM XLMRoberta XLNet
"""


@dataclass(frozen=True)
class TokenizerClass:
    """The class that transformers makes of a folder.

    Attributes:
        name: without "Fast"; "" for those that take tokenizer.json as it is.
        config: what the folder says beside tokenizer.json.
        path: of tokenizer_config.json.
    """

    name: str
    config: TokenizerConfig
    path: Path

    @classmethod
    def from_folder(cls, files: ModelFiles, config: TokenizerConfig, content: bytes) -> TokenizerClass:
        """Args:
        content: of tokenizer.json.

        Raises:
            ModelFileError: a field is malformed.
            UnsupportedModel: the class is code of the folder, or one that cannot be built from tokenizer.json.
        """
        path = files.path(CONFIG_FILE)
        model = read_model_json(files, "config.json") if files.has("config.json") else {}
        name = config.content.get("tokenizer_class") or model.get("tokenizer_class") or ""
        if not isinstance(name, str):
            raise ModelFileError(path, f"tokenizer_class is {brief(name)!r}, not the name of a class")
        name = name if name in _GENERIC else name.removesuffix("Fast")
        code = config.content.get("auto_map")
        has_code = bool(code.get("AutoTokenizer") if isinstance(code, dict) else code)
        kind = model.get("model_type")
        if not has_code:
            if kind == "qwen2":
                name = _QWEN2
            elif kind == "mistral" or (name == _LLAMA and b'"ByteLevel"' in content):
                name = ""
        elif kind not in ("qwen2", "mistral") and name not in (*_GENERIC[1:], *_DEFAULTS):
            raise UnsupportedModel("auto_map", code, "a tokenizer without code of its own")
        elif name == _LLAMA and b'"ByteLevel"' in content:
            raise UnsupportedModel(
                "auto_map", code, f"none with tokenizer_class {_LLAMA} and a byte-level tokenizer.json"
            )
        if name.removesuffix("Tokenizer") in _OF_OTHER_NETWORKS.split():
            raise UnsupportedModel("tokenizer_class", name, "a class for this network, such as PreTrainedTokenizerFast")
        return cls("" if name in _GENERIC else name, config, path)

    def rebuilt(self, content: bytes, backend: tokenizers.Tokenizer) -> bytes:
        """Returns the tokenizer.json that is followed.

        Args:
            content: the folder's.
            backend: what it makes.

        Raises:
            ModelFileError: a field is malformed.
            UnsupportedModel: a field contradicts tokenizer.json, and what the class makes of it is not known here.
        """
        if not self.name:
            return content
        if self.name == _LLAMA:
            return self._llama(content, backend)
        prefix = self._flag("add_prefix_space")
        if self.name not in (_QWEN2, _GPT2):
            self._refuse_contradictions(prefix, backend)
        elif prefix is not None and prefix != _adds_prefix(backend):
            return self._byte_level(content, prefix, backend)
        return content

    def with_defaults(self) -> TokenizerConfig:
        """The folder's tokens, and those that its class has where no file says otherwise."""
        more = {name: token for name, token in _DEFAULTS.get(self.name, {}).items() if name not in self.config.content}
        named = {**more, **self.config.named}
        in_order = {name: named[name] for name in NAMED if name in named}
        return replace(self.config, named={**in_order, **named})

    def _llama(self, content: bytes, backend: tokenizers.Tokenizer) -> bytes:
        self._require_bpe(backend)
        prefix, legacy = self._flag("add_prefix_space"), self._flag("legacy")
        tokenizer = json.loads(content)
        plain = {"fuse_unk": True, "byte_fallback": True, "dropout": None, "ignore_merges": False}
        if not all(f"<0x{byte:02X}>" in tokenizer["model"]["vocab"] for byte in range(256)):
            plain["unk_token"] = None
        changed = _changed(tokenizer["model"], plain)
        steps: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix is not False:
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        decoder = {"type": "Sequence", "decoders": steps}
        changed |= decoder != tokenizer.get("decoder")
        tokenizer["decoder"] = decoder
        if prefix is not None or legacy is not None:
            scheme = "never" if prefix is False else "always" if legacy else "first"
            tokenizer["normalizer"], tokenizer["added_tokens"] = None, []
            tokenizer["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": scheme,
                "split": False,
            }
            changed = True
        # That of a real checkpoint is not read a second time.
        return _written(tokenizer) if changed else content

    def _byte_level(self, content: bytes, prefix: bool, backend: tokenizers.Tokenizer) -> bytes:
        self._require_bpe(backend)
        tokenizer = json.loads(content)
        affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
        plain = {"fuse_unk": False, "byte_fallback": False, "dropout": None, "unk_token": None, "ignore_merges": False}
        tokenizer["model"] |= {**affixes, **plain}
        level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
        tokenizer["normalizer"], tokenizer["pre_tokenizer"], tokenizer["decoder"] = None, level, level
        tokenizer["added_tokens"] = []
        if self.name == _QWEN2:
            words = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
            tokenizer["normalizer"] = {"type": "NFC"}
            tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [words, {**level, "use_regex": False}]}
        return _written(tokenizer)

    def _require_bpe(self, backend: tokenizers.Tokenizer) -> None:
        if not isinstance(backend.model, tokenizers.models.BPE):
            raise UnsupportedModel("tokenizer_class", self.name, "a tokenizer.json with a BPE model for this class")

    def _refuse_contradictions(self, prefix: bool | None, backend: tokenizers.Tokenizer) -> None:
        if prefix is not None and prefix != (found := _adds_prefix(backend)):
            raise UnsupportedModel("add_prefix_space", prefix, f"{found}, as in tokenizer.json")
        normalizers = list(_parts(backend.normalizer))
        for field, name in _OF_NORMALIZER.items():
            value = self._flag(field)
            kept = any(part.get(name) or part.get("type", "").lower() == name.replace("_", "") for part in normalizers)
            if value is not None and value != kept:
                raise UnsupportedModel(field, value, f"{kept}, as in tokenizer.json")

    def _flag(self, name: str) -> bool | None:
        """None where it is not said."""
        value = self.config.content.get(name)
        if value is not None and not isinstance(value, bool):
            raise ModelFileError(self.path, f"{name} is {brief(value)!r}, neither true nor false")
        return value


def _changed(fields: dict[str, Any], wanted: Mapping[str, object]) -> bool:
    """Sets fields; whether any of them meant something else before."""
    changed = any((fields.get(name) or None) != (value or None) for name, value in wanted.items())
    fields |= wanted
    return changed


def _written(tokenizer: dict[str, Any]) -> bytes:
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def _adds_prefix(backend: tokenizers.Tokenizer) -> bool:
    """Whether the first word of a text is encoded as one after a space."""
    parts = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer)]
    return any(
        part["type"] == "Prepend" or part.get("add_prefix_space") or part.get("prepend_scheme") in ("always", "first")
        for part in parts
    )


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """What a normalizer or a pre-tokenizer consists of."""
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += part.get("normalizers", part.get("pretokenizers", []))
