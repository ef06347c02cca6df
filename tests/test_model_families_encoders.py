"""Encoders, encoder-decoders, vision and speech: published counts, facts that memory reads, and the meta device."""

from typing import Any

import pytest

from hfvram.errors import HfvramError
from hfvram.model.architecture import Architecture
from hfvram.model.config import Config
from hfvram.model.families import reader
from hfvram.model.layers import Attention


def read(class_name: str | None = None, **values: Any) -> Architecture:
    found = reader(values["model_type"])
    assert found is not None
    return found(Config(values), class_name)


# Sizes that a configuration leaves out are the family's own, as in the named checkpoint.
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
ALBERT = {"model_type": "albert", "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
DEBERTA_V3 = {
    "model_type": "deberta-v2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
}
T5_BASE = {"model_type": "t5", "d_model": 768, "num_layers": 12, "d_ff": 3072, "num_heads": 12}
BART_BASE = {
    "model_type": "bart",
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}
WHISPER_LARGE_V3 = {
    "model_type": "whisper",
    "d_model": 1280,
    "encoder_layers": 32,
    "decoder_layers": 32,
    "encoder_attention_heads": 20,
    "decoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "decoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "vocab_size": 51866,
}
YOLOS_TINY = {
    "model_type": "yolos",
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": [800, 1333],
    "use_mid_position_embeddings": False,
    "num_labels": 91,
}

COUNTS: list[tuple[str | None, dict[str, Any], int]] = [
    ("BertModel", {"model_type": "bert"}, 109_482_240),  # google-bert/bert-base-uncased
    ("BertForMaskedLM", {"model_type": "bert"}, 109_514_298),
    ("RobertaModel", {"model_type": "roberta", **ROBERTA}, 124_645_632),  # FacebookAI/roberta-base
    ("RobertaForMaskedLM", {"model_type": "roberta", **ROBERTA}, 124_697_433),
    ("XLMRobertaModel", {"model_type": "xlm-roberta", "vocab_size": 250002, **ROBERTA}, 278_043_648),
    ("CamembertForMaskedLM", {"model_type": "camembert", "vocab_size": 32005, **ROBERTA}, 110_655_493),
    ("ElectraModel", {"model_type": "electra"}, 13_483_008),  # google/electra-small-discriminator
    ("MPNetModel", {"model_type": "mpnet", "max_position_embeddings": 514}, 109_486_464),  # all-mpnet-base-v2
    ("DistilBertModel", {"model_type": "distilbert"}, 66_362_880),  # distilbert-base-uncased
    ("AlbertModel", ALBERT, 11_683_584),  # albert/albert-base-v2
    ("DebertaV2Model", DEBERTA_V3, 183_831_552),  # microsoft/deberta-v3-base
    ("ModernBertForMaskedLM", {"model_type": "modernbert"}, 149_655_232),  # answerdotai/ModernBERT-base
    ("NomicBertModel", {"model_type": "nomic_bert"}, 136_731_648),  # nomic-ai/nomic-embed-text-v1.5
    (None, {"model_type": "t5"}, 60_506_624),  # google-t5/t5-small
    (None, T5_BASE, 222_903_552),  # google-t5/t5-base
    ("BartModel", BART_BASE, 139_420_416),  # facebook/bart-base
    (None, {"model_type": "bart", "vocab_size": 50264}, 406_290_432),  # facebook/bart-large-cnn
    (None, {"model_type": "m2m_100"}, 483_905_536),  # facebook/m2m100_418M
    (None, {"model_type": "mbart", "vocab_size": 250054}, 610_879_488),  # facebook/mbart-large-50
    (None, {"model_type": "whisper"}, 37_760_640),  # openai/whisper-tiny
    (None, WHISPER_LARGE_V3, 1_543_490_560),  # openai/whisper-large-v3
    ("ViTModel", {"model_type": "vit"}, 86_389_248),  # google/vit-base-patch16-224-in21k
    ("ViTForImageClassification", {"model_type": "vit", "num_labels": 1000}, 86_567_656),
    ("DeiTForImageClassificationWithTeacher", {"model_type": "deit", "num_labels": 1000}, 87_338_192),
    ("YolosForObjectDetection", YOLOS_TINY, 6_488_736),  # hustvl/yolos-tiny
    (None, {"model_type": "dinov2", "image_size": 518}, 86_580_480),  # facebook/dinov2-base
    (None, {"model_type": "clip"}, 151_277_313),  # openai/clip-vit-base-patch32
    (None, {"model_type": "siglip"}, 203_155_970),  # google/siglip-base-patch16-224
    (None, {"model_type": "git"}, 176_619_066),  # microsoft/git-base
    ("Wav2Vec2ForCTC", {"model_type": "wav2vec2"}, 94_396_320),  # facebook/wav2vec2-base-960h
    ("HubertModel", {"model_type": "hubert"}, 94_371_712),  # facebook/hubert-base-ls960
]


@pytest.mark.parametrize(
    ("class_name", "values", "count"), COUNTS, ids=[f"{c[1]['model_type']}-{c[2]}" for c in COUNTS]
)
def test_published_counts(class_name: str | None, values: dict[str, Any], count: int) -> None:
    assert read(class_name, **values).parameters == count


def attentions(architecture: Architecture, stack: str) -> list[tuple[Attention, ...]]:
    layers = architecture.stack(stack).layers
    return [tuple(m for m in layer.mixers if isinstance(m, Attention)) for layer in layers]


@pytest.mark.parametrize("values", [{"model_type": "t5"}, {"model_type": "bart"}, {"model_type": "whisper"}])
def test_a_decoder_caches_itself_and_its_encoder(values: dict[str, Any]) -> None:
    """One cache of its own tokens and one of the encoder's in every layer of the decoder; none in the encoder."""
    model = read(**values)
    assert (model.task, model.main) == ("seq2seq", "decoder")
    for own, cross in attentions(model, "decoder"):
        assert (own.kind, own.causal, own.cached) == ("full_attention", True, True)
        assert (cross.kind, cross.causal, cross.cached) == ("cross_attention", False, True)
    for (own,) in attentions(model, "encoder"):
        assert (own.kind, own.causal, own.cached) == ("full_attention", False, False)


@pytest.mark.parametrize(
    "values", [{"model_type": "bert"}, {"model_type": "modernbert"}, {"model_type": "vit"}, {"model_type": "wav2vec2"}]
)
def test_an_encoder_has_no_cache(values: dict[str, Any]) -> None:
    model = read(**values)
    assert model.task == "encoder"
    assert {(a.causal, a.cached) for layer in attentions(model, model.main) for a in layer} == {(False, False)}


def test_bert_as_a_decoder_caches() -> None:
    model = read("BertLMHeadModel", model_type="bert", is_decoder=True)
    assert model.task == "causal"
    assert {(a.causal, a.cached) for (a,) in attentions(model, "text")} == {(True, True)}


def test_albert_runs_twelve_layers_and_owns_one() -> None:
    text = read("AlbertModel", **ALBERT).text
    assert (len(text.layers), sorted(text.repeated)) == (12, list(range(1, 12)))
    groups = read("AlbertModel", **ALBERT, num_hidden_groups=3, inner_group_num=2).text
    # Layers 0-3 run group 0, 4-7 group 1, 8-11 group 2, each of two layers.
    assert len(groups.layers) == 24
    assert sorted(set(range(24)) - groups.repeated) == [0, 1, 8, 9, 16, 17]


def test_whisper_always_sees_thirty_seconds() -> None:
    whisper = read(model_type="whisper")
    assert whisper.stack("encoder").tokens == 1500
    assert whisper.max_positions == 448


def test_images_are_a_fixed_number_of_tokens() -> None:
    # 14 · 14 patches and a class token; DeiT has a token more, YOLOS 100, over 50 · 83 patches.
    assert read(model_type="vit").text.tokens == 197
    assert read(model_type="deit").text.tokens == 198
    assert read(**YOLOS_TINY).text.tokens == 50 * 83 + 101
    # CLIP: 7 · 7 patches of 32 pixels and a class token; SigLIP: 14 · 14 without one. Text has the prompt's length.
    assert [s.tokens for s in read(model_type="clip").stacks] == [None, 50]
    assert [s.tokens for s in read(model_type="siglip").stacks] == [None, 196]


def test_git_runs_its_eager_code_alone() -> None:
    git = read(model_type="git")
    assert {a.implementations for s in ("vision", "text") for (a,) in attentions(git, s)} == {("eager",)}


def test_t5_has_a_position_bias_and_no_flash_attention() -> None:
    for own, cross in attentions(read(**T5_BASE), "decoder"):
        assert own.position_bias
        assert cross.position_bias
        assert own.implementations == ("sdpa", "eager")
    buckets = [p.name for p in read(**T5_BASE).all_params if "relative_attention_bias" in p.name]
    assert len(buckets) == 2  # the first layer of each stack, 24 in UMT5
    umt5 = read(model_type="umt5", num_layers=12)
    assert len([p for p in umt5.all_params if "relative_attention_bias" in p.name]) == 24
    assert read(**T5_BASE).fp32_in_fp16 == ("wo",)


def test_t5_ties_whatever_its_configuration_says() -> None:
    """T5 1.1 and Flan-T5 say `tie_word_embeddings: false`; transformers 5 ties all the same."""
    assert read(**T5_BASE, tie_word_embeddings=False).parameters == 222_903_552


def test_modernbert_attends_locally_but_for_every_third_layer() -> None:
    model = read(model_type="modernbert")
    assert model.layer_kinds == {"full_attention": 8, "sliding_attention": 14, "dense": 22}
    assert {a.window for (a,) in attentions(model, "text")} == {None, 65}  # 64 tokens to either side, and itself


def test_deberta_has_relative_scores_by_its_eager_code_alone() -> None:
    (attention,) = attentions(read(**DEBERTA_V3), "text")[0]
    assert (attention.position_bias, attention.implementations) == (True, ("eager",))


def test_roberta_counts_positions_from_behind_the_padding() -> None:
    assert read(model_type="roberta", max_position_embeddings=514, pad_token_id=1).max_positions == 512
    assert read(model_type="bert").max_positions == 512


def test_clip_text_is_causal_and_siglip_text_is_not() -> None:
    assert {a.causal for (a,) in attentions(read(model_type="clip"), "text")} == {True}
    assert {a.causal for (a,) in attentions(read(model_type="siglip"), "text")} == {False}
    assert [s.name for s in read(model_type="clip").stacks] == ["text", "vision"]


def test_the_class_comes_from_architectures_where_it_is_the_familys() -> None:
    base = {"model_type": "bert"}
    assert read(**base, architectures=["BertForTokenClassification"]).class_name == "BertForTokenClassification"
    assert read(**base, architectures=["RemoteBertForMaskedLM"]).class_name == "BertModel"
    assert read(**base).class_name == "BertModel"


def test_labels_are_counted_by_their_names() -> None:
    three = {"0": "no", "1": "maybe", "2": "yes"}
    head = read("BertForSequenceClassification", model_type="bert", id2label=three).head
    assert [p.shape for p in head] == [(3, 768), (3,)]


BAD: list[tuple[str | None, dict[str, Any], str, str]] = [
    ("BertForTelepathy", {"model_type": "bert"}, "unknown_architecture", "BertForTelepathy"),
    ("GPT2Model", {"model_type": "bert"}, "unknown_architecture", "GPT2Model"),
    ("BartForCausalLM", {"model_type": "bart"}, "unknown_architecture", "BartForCausalLM"),
    ("WhisperForAudioClassification", {"model_type": "whisper"}, "unknown_architecture", "Whisper"),
    ("CLIPTextModelWithHat", {"model_type": "clip"}, "unknown_architecture", "CLIPTextModelWithHat"),
    (None, {"model_type": "bert", "add_cross_attention": True}, "unknown_architecture", "add_cross_attention"),
    (None, {"model_type": "wav2vec2", "add_adapter": True}, "unknown_architecture", "add_adapter"),
    (None, {"model_type": "wav2vec2", "feat_extract_norm": "ring"}, "unknown_architecture", "'ring'"),
    (None, {"model_type": "modernbert", "layer_types": ["ring"] * 22}, "unknown_architecture", "'ring'"),
    (None, {"model_type": "bert", "num_attention_heads": 7}, "bad_config", "hidden_size"),
    (None, {"model_type": "bert", "vocab_size": -1}, "bad_config", "vocab_size"),
    (None, {"model_type": "albert", "num_hidden_groups": 13}, "bad_config", "13 groups"),
    (None, {"model_type": "albert", "inner_group_num": 4096}, "bad_config", "4096"),
    (None, {"model_type": "t5", "feed_forward_proj": "a-b-c"}, "bad_config", "feed_forward_proj"),
    (None, {"model_type": "vit", "image_size": [1, 2, 3]}, "bad_config", "image_size"),
    (None, {"model_type": "dinov2", "mlp_ratio": -3}, "bad_config", "mlp_ratio"),
    (None, {"model_type": "wav2vec2", "conv_dim": [1]}, "bad_config", "conv_dim"),
]


@pytest.mark.parametrize(("class_name", "values", "kind", "words"), BAD)
def test_what_cannot_be_built_is_said(class_name: str | None, values: dict[str, Any], kind: str, words: str) -> None:
    with pytest.raises(HfvramError) as error:
        read(class_name, **values)
    assert error.value.kind == kind
    assert words in error.value.message


B = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
B |= {"pad_token_id": 0}
D = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
E = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4}
E |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 20}
E |= {"pad_token_id": 1, "eos_token_id": 2, "max_source_positions": 30, "max_target_positions": 20}
P = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
P |= {"image_size": 32, "patch_size": 8, "projection_dim": 24}
X = {**B, "projection_dim": 16, "max_position_embeddings": 20}
A = {**B, "conv_dim": [16, 24, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2]}
A |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}

COMMON = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
HEADS = {
    ("bert", "Bert"): (
        *COMMON,
        "ForQuestionAnswering",
        "ForMultipleChoice",
        "LMHeadModel",
        "ForPreTraining",
        "ForNextSentencePrediction",
    ),
    ("roberta", "Roberta"): (*COMMON, "ForQuestionAnswering", "ForMultipleChoice", "ForCausalLM"),
    ("xlm-roberta", "XLMRoberta"): (*COMMON, "ForMultipleChoice"),
    ("camembert", "Camembert"): COMMON,
    ("electra", "Electra"): (*COMMON, "ForQuestionAnswering", "ForPreTraining"),
    ("mpnet", "MPNet"): (*COMMON, "ForQuestionAnswering", "ForMultipleChoice"),
    ("distilbert", "DistilBert"): (*COMMON, "ForQuestionAnswering", "ForMultipleChoice"),
    ("albert", "Albert"): (*COMMON, "ForQuestionAnswering", "ForMultipleChoice", "ForPreTraining"),
    ("deberta", "Deberta"): (*COMMON, "ForQuestionAnswering"),
    ("deberta-v2", "DebertaV2"): (*COMMON, "ForQuestionAnswering", "ForMultipleChoice"),
    ("modernbert", "ModernBert"): (*COMMON, "ForQuestionAnswering", "ForMultipleChoice"),
    ("nomic_bert", "NomicBert"): COMMON,
}
TINY: list[tuple[dict[str, Any], str | None]] = [
    *(
        ({"model_type": kind, **B, "num_labels": 2 if head == "ForQuestionAnswering" else 3}, f"{family}{head}")
        for (kind, family), heads in HEADS.items()
        for head in heads
    ),
    *(({"model_type": k, **B, "tie_word_embeddings": False}, f"{f}ForMaskedLM") for k, f in HEADS),
    (
        {"model_type": "albert", **B, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
        "AlbertModel",
    ),
    ({"model_type": "electra", **B, "embedding_size": 32}, "ElectraModel"),
    (
        {
            "model_type": "deberta",
            **B,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "talking_head": True,
            "position_biased_input": False,
            "type_vocab_size": 2,
            "embedding_size": 16,
        },
        "DebertaForMaskedLM",
    ),
    (
        {
            "model_type": "deberta-v2",
            **B,
            "relative_attention": True,
            "pos_att_type": "c2p|p2c",
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
            "share_att_key": True,
        },
        "DebertaV2ForSequenceClassification",
    ),
    (
        {
            "model_type": "deberta-v2",
            **B,
            "relative_attention": True,
            "pos_att_type": ["c2p"],
            "max_relative_positions": 20,
            "conv_kernel_size": 3,
            "conv_groups": 2,
        },
        "DebertaV2ForSequenceClassification",
    ),
    (
        {
            "model_type": "modernbert",
            **B,
            "num_hidden_layers": 5,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "classifier_bias": True,
            "decoder_bias": False,
            "global_attn_every_n_layers": 2,
        },
        "ModernBertForMaskedLM",
    ),
    ({"model_type": "bert", **B, "is_decoder": True}, "BertLMHeadModel"),
    *(
        ({"model_type": kind, **D, "num_labels": 3}, f"{kind.upper()}{head}")
        for kind in ("t5", "mt5", "umt5")
        for head in ("ForConditionalGeneration", "EncoderModel", "ForSequenceClassification", "ForTokenClassification")
    ),
    ({"model_type": "t5", **D, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"}, "T5ForQuestionAnswering"),
    ({"model_type": "mt5", **D, "feed_forward_proj": "relu", "tie_word_embeddings": False}, "MT5Model"),
    *(
        ({"model_type": kind, **E, "tie_word_embeddings": tied}, name)
        for kind, names in {
            "bart": ("BartForConditionalGeneration", "BartModel", "BartForSequenceClassification"),
            "mbart": ("MBartForConditionalGeneration", "MBartModel", "MBartForQuestionAnswering"),
            "marian": ("MarianMTModel", "MarianModel"),
            "pegasus": ("PegasusForConditionalGeneration", "PegasusModel"),
            "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Model"),
            "whisper": ("WhisperForConditionalGeneration", "WhisperModel"),
        }.items()
        for name in names
        for tied in (True, False)
    ),
    ({"model_type": "marian", **E, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 50}, None),
    ({"model_type": "pegasus"}, None),
    ({"model_type": "m2m_100"}, None),  # its positions are buffers beyond 64 KiB
    ({"model_type": "vit", **P, "image_size": [32, 64], "patch_size": [8, 16], "qkv_bias": False}, "ViTModel"),
    ({"model_type": "vit", **P, "pooler_output_size": 40}, "ViTModel"),
    ({"model_type": "vit", **P, "num_labels": 5}, "ViTForImageClassification"),
    ({"model_type": "deit", **P}, "DeiTModel"),
    ({"model_type": "deit", **P, "num_labels": 5}, "DeiTForImageClassificationWithTeacher"),
    ({"model_type": "yolos", **P, "image_size": [32, 48]}, "YolosModel"),
    ({"model_type": "yolos", **P, "image_size": [32, 48], "num_labels": 5}, "YolosForObjectDetection"),
    ({"model_type": "dinov2", **P, "use_swiglu_ffn": True, "mlp_ratio": 3}, "Dinov2Model"),
    ({"model_type": "dinov2", **P, "use_mask_token": False, "num_labels": 5}, "Dinov2ForImageClassification"),
    *(
        (values, None)
        for kind in ("clip", "siglip")
        for values in (
            {"model_type": kind, "text_config": X, "vision_config": P},
            {"model_type": f"{kind}_vision_model", **P},
        )
    ),
    ({"model_type": "clip", "text_config": X, "vision_config": P, "num_labels": 7}, "CLIPForImageClassification"),
    ({"model_type": "clip_text_model", **X}, "CLIPTextModelWithProjection"),
    ({"model_type": "clip_vision_model", **P}, "CLIPVisionModelWithProjection"),
    ({"model_type": "siglip_text_model", **X, "projection_size": 40}, "SiglipTextModel"),
    ({"model_type": "siglip_vision_model", **P, "vision_use_head": False}, None),
    ({"model_type": "git", **B, "vision_config": P}, None),
    ({"model_type": "git", **B, "vision_config": P, "num_image_with_embedding": 3, "tie_word_embeddings": True}, None),
    *(({"model_type": "wav2vec2", **A, "num_labels": 5}, f"Wav2Vec2{h}") for h in ("Model", "ForCTC")),
    (
        {
            "model_type": "wav2vec2",
            **A,
            "feat_extract_norm": "layer",
            "conv_bias": True,
            "do_stable_layer_norm": True,
            "mask_time_prob": 0.0,
            "adapter_attn_dim": 8,
            "use_weighted_layer_sum": True,
        },
        "Wav2Vec2ForSequenceClassification",
    ),
    ({"model_type": "hubert", **A, "feat_proj_layer_norm": False}, "HubertForCTC"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "class_name"), TINY, ids=lambda v: v.get("model_type") if isinstance(v, dict) else v
)
def test_closed_form_is_the_model_on_meta(values: dict[str, Any], class_name: str | None) -> None:
    from on_meta import differences

    assert differences(values, class_name) == []
