"""The zoo's tokenizer and text encoder: caption words as pieces, letters and bytes for everything
else.
"""

import string

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ditcache.clips import world

DIM = 64
VERBS = (
    "moves",
    "moving",
    "slides",
    "sliding",
    "drifts",
    "drifting",
    "spins",
    "grows",
    "shrinks",
    "stays",
    "turns",
)
SMALL_WORDS = (
    "a",
    "an",
    "the",
    "on",
    "over",
    "background",
    "and",
    "then",
    "is",
    "to",
    "with",
    "in",
    "of",
    "into",
)
LATER_WORDS = (
    "slowly",
    "quickly",
    "still",
    "small",
    "large",
    "bounces",
    "edit",
    "make",
    "it",
    "becomes",
    "from",
    "clockwise",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram over lower-cased text: no word of the captions is ever split, nothing is ever
    unknown.
    """
    words = [
        *world.OBJECT_COLOURS,
        *world.BACKGROUNDS,
        *world.TEXTURES,
        *world.SHAPES,
        *world.DIRECTIONS,
    ]
    words += [*VERBS, *SMALL_WORDS, *LATER_WORDS]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0)]
    pieces += [(f"▁{word}", -1.0) for word in dict.fromkeys(words)]
    pieces += [("▁", -4.0)]
    pieces += [
        (letter, -5.0) for letter in string.ascii_lowercase + string.digits + string.punctuation
    ]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    core = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Random weights, two layers."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
