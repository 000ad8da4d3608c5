"""TSDAE against the library's own class, with real decoders."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as library
from st_parts import HIDDEN, WORDS, assert_same, build, sentences, static_model, train, value_and_grads, word_tokenizer
from st_shapes import Shapes
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
)

from chunked_embed import losses

Ours, Theirs = losses.DenoisingAutoEncoderLoss, library.DenoisingAutoEncoderLoss
VOCABULARY = 31  # no other dimension's size
ROWS = 9
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40}
GPT2 = GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=40, eos_token_id=3)
CROSS = {"is_decoder": True, "add_cross_attention": True}


@pytest.fixture(scope="module")
def folders(transformer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Decoders, whole: a part that is missing is drawn anew whenever one is loaded."""
    torch.manual_seed(1)
    bert = BertConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, **SIZES, **CROSS)
    roberta = RobertaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, pad_token_id=0, **SIZES, **CROSS)
    own_head = BertConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, tie_word_embeddings=False, **SIZES, **CROSS)
    GPT2.add_cross_attention = True
    made = {
        "bert": BertLMHeadModel(bert),
        "own head": BertLMHeadModel(own_head),
        "roberta": RobertaForCausalLM(roberta),
        "gpt2": GPT2LMHeadModel(GPT2),
    }
    found = {"tied": transformer_dir}
    for name, decoder in made.items():
        special = {"pad_token": "[PAD]"} if name != "gpt2" else {"eos_token": "[SEP]"}
        folder = found[name] = str(tmp_path_factory.mktemp("decoder"))
        decoder.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=word_tokenizer(), unk_token="[UNK]", **special, padding_side="right"
        ).save_pretrained(folder)
    return found


DECODERS = ("tied", "bert", "own head", "roberta", "gpt2")
every_decoder = pytest.mark.parametrize("decoder", DECODERS)


def make(kind: type, folders: dict[str, str], decoder: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """The loss with the same weights at every call, and no dropout."""
    torch.manual_seed(2)
    model = build(folders["tied"])
    args = (model,) if decoder == "tied" else (model, folders[decoder], False)
    loss = kind(*args, **options).to(dtype)
    for module in loss.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return loss.train()


def pair(folders: dict[str, str], decoder: str, kind: type = Ours, **options) -> tuple[nn.Module, nn.Module]:
    return make(kind, folders, decoder, **{"compiled": False, **options}), make(Theirs, folders, decoder)


def texts(model: SentenceTransformer, rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Damaged and whole: every other word is gone."""
    whole = [f"{text} {text}" for text in sentences(rows, 0)]
    return [model.preprocess([" ".join(text.split()[::2]) for text in whole]), model.preprocess(whole)]


def assert_equal(ours: nn.Module, theirs: nn.Module, batch: list | None = None) -> None:
    batch = batch or texts(ours.encoder)
    results = [value_and_grads(loss, loss, batch, None, upstream=2.0) for loss in (ours, theirs)]
    names = set(results[0][1])
    assert any(name.startswith("encoder.") for name in names)
    assert_same(*results)


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged of logits that are held; a test that does not ask says that there is nothing."""
    asked: list[bool] = []

    def messages() -> list[str]:
        asked.append(True)
        return [record.getMessage() for record in caplog.records if "holds all logits" in record.getMessage()]

    with caplog.at_level(logging.WARNING, "chunked_embed"):
        yield messages
        if not asked:
            assert messages() == []


@every_decoder
@pytest.mark.parametrize("options", [{}, {"chunk_size": 16}, {"max_chunk_bytes": 4000}], ids=str)
def test_equals_the_library(options: dict, decoder: str, folders: dict[str, str]) -> None:
    ours, theirs = pair(folders, decoder, **options)
    head = ours.decoder.get_output_embeddings().weight
    tied = {"tied": ours.encoder[0].model.embeddings.word_embeddings.weight, "own head": head}
    words = ours.decoder.get_input_embeddings().weight
    assert head is tied.get(decoder, words) and (head is words) == (decoder != "own head")
    assert_equal(ours, theirs)
    assert head.grad is not None


def test_dropout_is_the_librarys(folders: dict[str, str]) -> None:
    results = []
    for loss in pair(folders, "bert"):
        for module in loss.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2
        torch.manual_seed(4)
        results.append(value_and_grads(loss, loss, texts(loss.encoder), None))
        results.append(value_and_grads(loss, loss, texts(loss.encoder), None))
    assert_same(results[0], results[2])
    assert_same(results[1], results[3])


def widest(loss: nn.Module, batch: list) -> int:
    """The most rows that anything as wide as the vocabulary has."""
    with Shapes() as shapes:
        loss(batch, None).backward()
    return shapes.most_rows(VOCABULARY)


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_logits_are_never_held(decoder: str, folders: dict[str, str]) -> None:
    ours, theirs = pair(folders, decoder)
    batch = texts(ours.encoder)
    padding = ours.tokenizer_decoder.pad_token_id
    target = batch[1]["input_ids"][:, 1:]
    used = int((target != padding).sum())
    assert used < target.numel() if decoder == "bert" else used == target.numel()
    assert widest(theirs, batch) == target.numel()
    ours.chunk_size = 16
    assert widest(ours, batch) == 16
    ours.chunk_size = target.numel()  # padding is dropped before the product
    assert widest(ours, batch) == used


# --- what is set later, and overridden -------------------------------------------------------------------------------


def test_attributes_set_later_count(folders: dict[str, str]) -> None:
    losses_ = pair(folders, "bert")
    batch = texts(losses_[0].encoder)
    losses_[0](batch)
    decoder, encoder = make(Theirs, folders, "gpt2").decoder, build(folders["tied"])
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter *= 0.9
    for loss in losses_:
        loss.tokenizer_decoder.pad_token = "the"  # another id is ignored
        loss.encoder, loss.decoder = copy.deepcopy(encoder), copy.deepcopy(decoder)
        loss.train()
    assert_equal(*losses_, batch)


def test_retokenization(folders: dict[str, str]) -> None:
    class Backwards(Ours):
        def retokenize(self, sentence_features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"input_ids": super().retokenize(sentence_features)["input_ids"].flip(1)}

    ours, theirs = pair(folders, "bert")
    for loss in (ours, theirs):
        loss.need_retokenization = True
    batch = texts(ours.encoder)
    assert_equal(ours, theirs, batch)
    other, _ = pair(folders, "bert", Backwards)
    other.need_retokenization = True
    theirs.retokenize = lambda f: {"input_ids": Theirs.retokenize(theirs, f)["input_ids"].flip(1)}
    assert_equal(other, theirs, batch)


def test_a_subclass_keeps_its_effect(folders: dict[str, str]) -> None:
    class Doubled(Ours):
        def forward(self, sentence_features: list, labels: Tensor | None = None) -> Tensor:
            return 2 * super().forward(sentence_features, labels)

    ours, theirs = pair(folders, "bert", Doubled)
    batch = texts(ours.encoder)
    value, grads = value_and_grads(theirs, theirs, batch, None, upstream=2.0)
    assert_same(value_and_grads(ours, ours, batch, None), (2 * value, grads))


# --- decoders that want their logits ---------------------------------------------------------------------------------


def capped(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = type(self).forward(self, *args, **kwargs)
    output.logits = output.logits.tanh()
    return output


def reshaped(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
    output = type(self).forward(self, input_ids, **kwargs)
    output.logits = output.logits.reshape(*input_ids.shape, VOCABULARY)
    return output


def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = type(self).forward(self, *args, **kwargs)
    output.logits = output.logits + type(self).forward(self, *args, **kwargs).logits
    return output


def flat(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = self.bert(*args, **{**kwargs, "return_dict": True})
    states = self.cls.predictions.transform(output.last_hidden_state)
    return (self.cls.predictions.decoder(states.flatten(0, 1)).unflatten(0, states.shape[:2]),)


class OwnHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh())


def own_head(decoder: nn.Module) -> None:
    decoder.cls.predictions.decoder.__class__ = OwnHead


FALLS_BACK: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "capped": (lambda d: setattr(d, "forward", MethodType(capped, d)), "more to its logits"),
    "reshaped": (lambda d: setattr(d, "forward", MethodType(reshaped, d)), r"more to its logits.*\("),
    "twice": (lambda d: setattr(d, "forward", MethodType(twice, d)), "call its head once"),
    "flat": (lambda d: setattr(d, "forward", MethodType(flat, d)), "call its head once"),
    "own forward": (own_head, "OwnHead with a forward of its own"),
    "no head": (lambda d: setattr(d, "get_output_embeddings", lambda: None), "no output embeddings"),
    "compiled": (lambda d: d.cls.compile(backend="eager"), "compiled"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("case", FALLS_BACK)
def test_other_decoders_are_the_librarys(case: str, folders: dict[str, str], told: Callable) -> None:
    change, reason = FALLS_BACK[case]
    ours, theirs = pair(folders, "bert")
    for loss in (ours, theirs):
        change(loss.decoder)
    for _ in range(2):
        assert_equal(ours, theirs)
    (message,) = told()
    assert re.search(reason, message) and "BertLMHeadModel" in message
    calls: list[Any] = []
    ours.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    ours(texts(ours.encoder))
    assert len(calls) == 1 or case == "twice"  # it is not asked again


def test_an_unknown_head_is_told_at_once(
    folders: dict[str, str], told: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BertLMHeadModel, "get_output_embeddings", lambda self: None)
    make(Ours, folders, "bert")
    assert "no output embeddings" in told()[0]


@pytest.mark.parametrize("error", [KeyError("its own"), torch.OutOfMemoryError("its own")], ids=repr)
def test_an_error_of_the_decoder_is_its_own(error: Exception, folders: dict[str, str]) -> None:
    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(error, torch.OutOfMemoryError):  # behind the head
            type(self).forward(self, *args, **kwargs)
        raise error

    ours, _ = pair(folders, "bert")
    ours.decoder.forward = MethodType(broken, ours.decoder)
    with pytest.raises(type(error), match="its own"):
        ours(texts(ours.encoder))
    assert not ours.decoder._forward_hooks and not ours.decoder.get_output_embeddings()._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_adapters_on_the_head(folders: dict[str, str]) -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = pair(folders, "own head")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["decoder", "query"], init_lora_weights=False)
    for loss in (ours, theirs):
        torch.manual_seed(3)
        loss.decoder = peft.get_peft_model(loss.decoder, config).double()
    assert_equal(ours, theirs)
    assert ours.decoder.get_base_model().cls.predictions.decoder.lora_B["default"].weight.grad.any()
    ours.chunk_size = 16
    assert widest(ours, texts(ours.encoder)) <= VOCABULARY  # the weight with the adapter


# --- as every loss here ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # raised inside inductor
def test_compiled(folders: dict[str, str]) -> None:
    assert_equal(*pair(folders, "tied", compiled=True))


def test_no_grad(folders: dict[str, str]) -> None:
    ours, theirs = pair(folders, "bert")
    batch = texts(ours.encoder)
    with torch.no_grad():
        value = ours(batch)
        torch.testing.assert_close(value, theirs(batch, None))
    assert not value.requires_grad


def test_nothing_but_padding(folders: dict[str, str]) -> None:
    """The library's mean of no tokens is NaN."""
    ours, theirs = pair(folders, "bert")
    batch = texts(ours.encoder)
    batch[1]["input_ids"] = torch.zeros_like(batch[1]["input_ids"])
    value, grads = value_and_grads(ours, ours, batch, None)
    assert value == 0 and not any(grad.any() for grad in grads.values())
    assert theirs(batch, None).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(dtype: torch.dtype, folders: dict[str, str]) -> None:
    """The logits are those of the decoder's states, not rounded."""
    loss = make(Ours, folders, "bert", dtype, compiled=False)
    batch = texts(loss.encoder, 40)
    states: list[Tensor] = []
    prediction = loss.decoder.cls.predictions
    prediction.transform.register_forward_hook(lambda module, args, output: states.append(output))
    value, grads = value_and_grads(loss, loss, batch, None)
    weight, bias = prediction.decoder.weight.double(), prediction.decoder.bias.double()
    logits, target = states[0].double() @ weight.T + bias, batch[1]["input_ids"][:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("decoder", ["tied", "gpt2"])
def test_autocast(decoder: str, folders: dict[str, str]) -> None:
    ours, theirs = (make(kind, folders, decoder, torch.float32) for kind in (Ours, Theirs))
    batch = texts(ours.encoder, 40)
    exact = value_and_grads(theirs, theirs, batch, None)
    errors = []
    for loss in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss([dict(column) for column in batch], None)
        loss.zero_grad()
        value.backward()
        grads = [(p.grad, exact[1][name]) for name, p in loss.named_parameters() if p.grad is not None]
        assert all(grad.dtype == torch.float32 for grad, _ in grads)
        of_grads = torch.stack([(grad - expected).norm() / expected.norm() for grad, expected in grads])
        errors.append(torch.stack([(value.detach() / exact[0] - 1).abs(), of_grads.median()]))
    assert (errors[0] <= 1.1 * errors[1] + 1e-3).all()


def test_config_and_class(folders: dict[str, str]) -> None:
    ours, theirs = make(Ours, folders, "bert"), make(Theirs, folders, "bert")
    assert isinstance(ours, Theirs) and ours.citation == theirs.citation
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    ours.chunk_size, ours.compiled = 8, False
    assert ours.get_config_dict() == {**theirs.get_config_dict(), "chunk_size": 8, "compiled": False}
    json.dumps(ours.get_config_dict())
    assert not hasattr(ours, "model")
    mine = list(inspect.signature(Ours).parameters.values())
    given = list(inspect.signature(Theirs).parameters.values())
    for one, other in zip(mine, given):
        assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    names = {p.name: p.kind for p in mine[len(given) :]}
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert names == dict.fromkeys(("chunk_size", "max_chunk_bytes", "compiled", "float32_outputs"), keyword)


def test_copies(folders: dict[str, str]) -> None:
    ours, _ = pair(folders, "tied")
    batch = texts(ours.encoder)
    expected = value_and_grads(ours, ours, batch, None)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same(value_and_grads(again, again, batch, None), expected)


REFUSED: dict[str, tuple[Callable, type, str]] = {
    "one column": (lambda make: make()([{}]), ValueError, "two columns.* got 1"),
    "mini_batch_size": (lambda make: make(mini_batch_size=4), TypeError, "expected options .* 'mini_batch_size'"),
    "gather": (lambda make: make(gather_across_devices=True), TypeError, "'gather_across_devices'"),
    "fuse": (lambda make: make(fuse_projection=True), TypeError, "'fuse_projection'"),
    "option": (lambda make: make(chunks=4), TypeError, "'chunks'"),
    "chunk_size": (lambda make: make(chunk_size=0), ValueError, "chunk_size"),
    "chunk_size, later": (lambda make: later(make(), "chunk_size", 0)([{}, {}]), ValueError, "chunk_size"),
    "mini_batch_size, later": (lambda make: later(make(), "mini_batch_size", 4), TypeError, "'mini_batch_size'"),
    "static": (lambda make: Ours(static_model()), ValueError, "StaticEmbedding"),
}


def later(loss: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(loss, name, value)
    return loss


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, folders: dict[str, str]) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(lambda **options: make(Ours, folders, "tied", **options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trains_like_the_library(folders: dict[str, str], tmp_path: Path) -> None:
    """With the noise drawn when a row is read, and dropout."""
    data = Dataset.from_dict({"text": [f"{text} {text}" for text in sentences(16, 0)]})

    def damaged(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {"noisy": [" ".join(text.split()[::2]) for text in batch["text"]], "text": batch["text"]}

    data.set_transform(damaged, columns=["text"], output_all_columns=True)
    ends = []
    for kind in (Ours, Theirs):
        torch.manual_seed(2)
        model = build(folders["tied"], dropout=True, dtype=torch.float32)
        loss = kind(model)
        trainer = train(model, loss, data, tmp_path, learning_rate=1e-2)
        history = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
        ends.append(([value for value in history if value is not None], loss.state_dict()))
    (ours, ours_state), (theirs, theirs_state) = ends
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert ours[-1] < ours[0]
    for name, value in theirs_state.items():
        torch.testing.assert_close(ours_state[name], value, rtol=1e-2, atol=2e-3)


assert len(WORDS) + 5 < VOCABULARY
