"""Tiny random encoders, encoder-decoders and speech models with tokenizers trained on the spot; real classes, no mocks.

All have width 64 and weights large enough for attention to matter. `config` goes into the model's configuration.
"""

import io
import json
import string
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2Tokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MT5Config,
    MT5ForConditionalGeneration,
    NllbTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from support.models import CORPUS

TEXTS = [
    *CORPUS,
    "Le ciel est bleu. Combien de pattes a un chat ? Quatre.",
    "Der Himmel ist blau, und der Fuchs ist rot.",
]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + "àâäçéèêëîïôöùûüßœ"
LONGEST = 256
"""Positions of each text model."""
ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
}
SEQ2SEQ = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": LONGEST,
}
BERT_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FAIRSEQ_WORDS = ("<s>", "<pad>", "</s>", "<unk>")
CODES = ("eng_Latn", "fra_Latn", "deu_Latn")
"""The languages of `build_nllb`."""
SPEECH_WINDOW_S = 2


def build_bert(folder: Path, seed: int = 0, **config: Any) -> Path:
    tokenizer = _make_bert_tokenizer()
    shape = _describe(BertConfig, tokenizer, ENCODER, config)
    return _save(folder, seed, BertForMaskedLM, shape, tokenizer)


def build_distilbert(folder: Path, seed: int = 0, **config: Any) -> Path:
    tokenizer = _make_bert_tokenizer()
    own = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": LONGEST}
    return _save(folder, seed, DistilBertForMaskedLM, _describe(DistilBertConfig, tokenizer, own, config), tokenizer)


def build_roberta(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Build a RoBERTa; its positions start after the padding id, so it has two more positions than tokens."""
    content = _train_byte_level([*FAIRSEQ_WORDS, "<mask>"])
    tokenizer = RobertaTokenizer(vocab=content["vocab"], merges=content["merges"], model_max_length=LONGEST)
    own = {**ENCODER, "max_position_embeddings": LONGEST + 2, "type_vocab_size": 1}
    return _save(folder, seed, RobertaForMaskedLM, _describe(RobertaConfig, tokenizer, own, config), tokenizer)


def build_deberta(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Build a DeBERTa like version 3: only relative positions, in buckets, with keys shared between both kinds."""
    tokenizer = DebertaV2Tokenizer(vocab=_make_unigram(BERT_WORDS), model_max_length=LONGEST)
    own = {
        **ENCODER,
        "relative_attention": True,
        "position_buckets": 16,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return _save(folder, seed, DebertaV2ForMaskedLM, _describe(DebertaV2Config, tokenizer, own, config), tokenizer)


def build_modernbert(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Build a ModernBERT with one global layer and two that see 8 tokens on each side."""
    tokenizer = _wrap(_train_byte_level(BERT_WORDS), "[CLS]", "[SEP]")
    own = {**ENCODER, "num_hidden_layers": 3, "global_attn_every_n_layers": 3, "local_attention": 16}
    own |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    return _save(folder, seed, ModernBertForMaskedLM, _describe(ModernBertConfig, tokenizer, own, config), tokenizer)


def build_t5(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Build a T5 1.0; with `feed_forward_proj="gated-gelu"` and `tie_word_embeddings=False` a T5 1.1."""
    return _build_t5(folder, seed, T5Config, T5ForConditionalGeneration, config)


def build_mt5(folder: Path, seed: int = 0, **config: Any) -> Path:
    own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **config}
    return _build_t5(folder, seed, MT5Config, MT5ForConditionalGeneration, own)


def build_bart(folder: Path, seed: int = 0, **config: Any) -> Path:
    content = _train_byte_level([*FAIRSEQ_WORDS, "<mask>"])
    tokenizer = RobertaTokenizer(vocab=content["vocab"], merges=content["merges"], model_max_length=LONGEST)
    own = {**SEQ2SEQ, "decoder_start_token_id": tokenizer.eos_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
    return _save(folder, seed, BartForConditionalGeneration, _describe(BartConfig, tokenizer, own, config), tokenizer)


def build_mbart(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Build an mBART-50: texts begin with their language (`en_XX`, `fr_XX`), and answers with an end token first."""
    tokenizer = MBart50Tokenizer(
        vocab=_make_unigram(FAIRSEQ_WORDS), src_lang="en_XX", tgt_lang="fr_XX", model_max_length=LONGEST
    )
    own = {**SEQ2SEQ, "decoder_start_token_id": tokenizer.eos_token_id}
    return _save(folder, seed, MBartForConditionalGeneration, _describe(MBartConfig, tokenizer, own, config), tokenizer)


def build_nllb(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Build an NLLB with the languages of CODES: texts begin with their language, answers with an end token before."""
    content = _train_bpe(FAIRSEQ_WORDS)
    tokenizer = NllbTokenizer(
        vocab=content["vocab"],
        merges=content["merges"],
        extra_special_tokens=list(CODES),
        src_lang="eng_Latn",
        tgt_lang="fra_Latn",
        model_max_length=LONGEST,
    )
    own = {**SEQ2SEQ, "decoder_start_token_id": tokenizer.eos_token_id}
    shape = _describe(M2M100Config, tokenizer, own, config)
    return _save(folder, seed, M2M100ForConditionalGeneration, shape, tokenizer)


def build_marian(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Marian with two sentencepiece models and one vocabulary; its answer begins with the padding token.

    transformers warns when such a tokenizer is made or loaded without sacremoses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *CHARACTERS]),
        model_writer=written,
        vocab_size=250,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    own_words = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    vocabulary = ["</s>", "<unk>", *(word for word in own_words if word not in ("<s>", "</s>", "<unk>")), "<pad>"]
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(written.getvalue())
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}), "utf-8")
    with warnings.catch_warnings(action="ignore"):
        tokenizer = MarianTokenizer(
            *(str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")), model_max_length=LONGEST
        )
    own = {**SEQ2SEQ, "decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": tokenizer.eos_token_id}
    return _save(folder, seed, MarianMTModel, _describe(MarianConfig, tokenizer, own, config), tokenizer)


def build_whisper(folder: Path, seed: int = 0, multilingual: bool = True, **config: Any) -> Path:
    """Build a Whisper for windows of two seconds, with 80 mels and all special tokens of OpenAI's, in their order."""
    tokenizer = _train_whisper_tokenizer()
    own = {name: size for name, size in SEQ2SEQ.items() if name != "max_position_embeddings"}
    own |= {"num_mel_bins": 80, "max_source_positions": 50 * SPEECH_WINDOW_S, "max_target_positions": 128}
    own["decoder_start_token_id"] = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    shape = _describe(WhisperConfig, tokenizer, own, config)
    generation = _describe_whisper_generation(tokenizer, shape, multilingual)
    extractor = WhisperFeatureExtractor(chunk_length=SPEECH_WINDOW_S)
    extractor.save_pretrained(folder)
    return _save(folder, seed, WhisperForConditionalGeneration, shape, tokenizer, generation=generation)


def build_wav2vec2(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Build a wav2vec 2.0 over letters, with a frame each 20 ms; layer norm makes it possible to mask padding."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<pad>", "<s>", "</s>", "<unk>", "|", "'", *string.ascii_uppercase]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True).save_pretrained(folder)
    own = {name: size for name, size in ENCODER.items() if name != "max_position_embeddings"}
    own |= {
        "conv_dim": (32, 32, 32),
        "conv_kernel": (10, 8, 8),
        "conv_stride": (5, 8, 8),
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "mask_time_prob": 0.0,
    }
    return _save(folder, seed, Wav2Vec2ForCTC, _describe(Wav2Vec2Config, tokenizer, own, config), tokenizer)


def _describe(kind: type, tokenizer: PreTrainedTokenizerBase, own: dict[str, Any], config: dict[str, Any]) -> Any:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "cls", "sep")}
    known = {name: token for name, token in ids.items() if token is not None}
    return kind(**{"vocab_size": len(tokenizer), **known, **own, **config})


def _save(
    folder: Path,
    seed: int,
    kind: type[PreTrainedModel],
    shape: Any,
    tokenizer: PreTrainedTokenizerBase,
    factor: float = 4.0,
    generation: GenerationConfig | None = None,
    untied: bool = False,
) -> Path:
    torch.manual_seed(seed)
    model = kind(shape)
    if untied:  # T5's configuration always says that it is tied; only the saved weights count
        model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(model.lm_head.weight.shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.mul_(factor)
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _build_t5(folder: Path, seed: int, kind: type, model: type[PreTrainedModel], config: dict[str, Any]) -> Path:
    """Keep T5's initial weights, which are already large."""
    words = ("<pad>", "</s>", "<unk>")
    tokenizer = T5Tokenizer(vocab=_make_unigram(words), extra_ids=10, model_max_length=LONGEST)
    own = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    shape = _describe(kind, tokenizer, own, config)
    untied = config.get("tie_word_embeddings") is False
    return _save(folder, seed, model, shape, tokenizer, factor=1.0, untied=untied)


def _content(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the trained model: `vocab`, and `merges` as pairs."""
    content = json.loads(tokenizer.to_str())["model"]
    return {**content, "merges": [tuple(pair) for pair in content.get("merges", [])]}


def _make_bert_tokenizer() -> BertTokenizer:
    """Make words of TEXTS single tokens and spell others; WordPiece's trainer would number pieces randomly."""
    splitter = pre_tokenizers.BertPreTokenizer()
    whole = {word for text in TEXTS for word, _ in splitter.pre_tokenize_str(text.lower())}
    letters = sorted({letter.lower() for letter in CHARACTERS})
    pieces = [*BERT_WORDS, *letters, *(f"##{letter}" for letter in letters), *sorted(whole - set(letters))]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=LONGEST)


def _train_byte_level(words: Iterable[str]) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=list(words), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _content(tokenizer)


def _train_bpe(words: Iterable[str], unknown: str = "<unk>") -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(words), initial_alphabet=list(CHARACTERS), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _content(tokenizer)


def _make_unigram(words: Sequence[str]) -> list[tuple[str, float]]:
    """Return pieces with their scores, `words` first with zero; a text is split into as few pieces as possible.

    The pieces come from BPE, since the unigram trainer finds other scores each time.
    """
    unknown = next(word for word in words if "unk" in word.lower())
    pieces = sorted(_train_bpe(words, unknown)["vocab"].items(), key=lambda piece: piece[1])
    return [(piece, 0.0 if i < len(words) else -5 - 0.001 * i) for piece, i in pieces]


def _wrap(content: dict[str, Any], first: str, last: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that puts `first` and `last` around each text."""
    tokenizer = Tokenizer(models.BPE(vocab=content["vocab"], merges=content["merges"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(word, content["vocab"][word]) for word in (first, last)],
    )
    named = {f"{name.strip('[]').lower()}_token": name for name in BERT_WORDS}
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LONGEST, model_input_names=names, **named
    )


def _train_whisper_tokenizer() -> WhisperTokenizer:
    content = _train_byte_level(["<|endoftext|>"])
    vocabulary = {word: i for i, word in enumerate([*list(content["vocab"])[1:], "<|endoftext|>"])}
    own = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    special = [f"<|{word}|>" for word in ("startoftranscript", *LANGUAGES, *own)]
    tokenizer = WhisperTokenizer(
        vocab=vocabulary,
        merges=content["merges"],
        pad_token="<|endoftext|>",
        extra_special_tokens=special,
        model_max_length=128,
    )
    steps = [f"<|{0.02 * step:.2f}|>" for step in range(1501)]
    tokenizer.add_tokens([AddedToken(step, normalized=False, special=False) for step in steps])
    return tokenizer


def _describe_whisper_generation(
    tokenizer: WhisperTokenizer, shape: WhisperConfig, multilingual: bool
) -> GenerationConfig:
    ids = tokenizer.convert_tokens_to_ids
    several: dict[str, Any] = {
        "lang_to_id": {f"<|{code}|>": ids(f"<|{code}|>") for code in LANGUAGES},
        "task_to_id": {task: ids(f"<|{task}|>") for task in ("transcribe", "translate")},
    }
    return GenerationConfig(
        bos_token_id=shape.bos_token_id,
        eos_token_id=shape.eos_token_id,
        pad_token_id=shape.pad_token_id,
        decoder_start_token_id=shape.decoder_start_token_id,
        prev_sot_token_id=ids("<|startofprev|>"),
        no_timestamps_token_id=ids("<|notimestamps|>"),
        is_multilingual=multilingual,
        return_timestamps=False,
        max_initial_timestamp_index=50,
        max_length=shape.max_target_positions,
        suppress_tokens=[ids(f"<|{word}|>") for word in ("startoftranscript", "startoflm", "startofprev", "nospeech")],
        begin_suppress_tokens=[ids("Ġ"), tokenizer.eos_token_id],
        **(several if multilingual else {}),
    )
