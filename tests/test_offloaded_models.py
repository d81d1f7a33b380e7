"""Models whose weights accelerate keeps elsewhere: on the meta device there is nothing that could be computed with."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from helpers import prompt, tiny_llama
from saving import saved_session, six_tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_kvquant
from hf_kvquant import PrefixCache, QuantizedPagedCache, bench, calibrate, compare

TINY = Path(__file__).parents[1] / "examples" / "tiny-python-lm"
TEXT = Path(hf_kvquant.__file__).parent.joinpath("cache.py").read_text(encoding="utf-8")
DEVICE_MAPS = {
    "disk": {"": "disk"},
    "disk and memory": {
        "model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    },
}  # fmt: skip
WAYS = ["cpu_offload", "disk_offload", *DEVICE_MAPS]


def offloaded(way: str, directory: Path, seed: int = 0) -> PreTrainedModel:
    """`tiny_llama(seed=seed)` without its weights in their places."""
    model = tiny_llama(seed=seed)
    if way == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if way == "disk_offload":
        return accelerate.disk_offload(model, directory / f"offloaded{seed}", execution_device=torch.device("cpu"))
    model.save_pretrained(directory / f"saved{seed}")
    return AutoModelForCausalLM.from_pretrained(
        directory / f"saved{seed}",
        attn_implementation="kvquant",
        dtype=torch.float32,
        device_map=DEVICE_MAPS[way],
        offload_folder=directory / f"offloaded{seed}",
    ).eval()


@pytest.mark.parametrize("way", WAYS)
def test_sessions_go_on_whether_weights_are_offloaded_or_not(way: str, tmp_path: Path) -> None:
    here, away = tiny_llama(), offloaded(way, tmp_path)
    assert away.device.type == "meta"
    for number, (writer, reader) in enumerate([(away, away), (here, away), (away, here)]):
        cache, text = saved_session(writer, tmp_path / f"session{number}")
        loaded = QuantizedPagedCache.from_pretrained(tmp_path / f"session{number}", reader)
        assert {layer.device for layer in loaded.layers} == {torch.device("cpu")}
        assert not [note for note in loaded.report().notes if "could not be checked" in note]
        assert torch.equal(six_tokens(reader, text, loaded), six_tokens(here, text, cache))


@pytest.mark.parametrize("way", WAYS)
def test_sessions_of_other_weights_are_refused(way: str, tmp_path: Path) -> None:
    away = offloaded(way, tmp_path)
    for seed, other in enumerate((offloaded(way, tmp_path, seed=1), tiny_llama(seed=1))):
        saved_session(other, tmp_path / f"session{seed}")
        with pytest.raises(ValueError, match="other weights"):
            QuantizedPagedCache.from_pretrained(tmp_path / f"session{seed}", away)
    saved_session(away, tmp_path / "session")
    with pytest.raises(ValueError, match="other weights"):
        QuantizedPagedCache.from_pretrained(tmp_path / "session", tiny_llama(seed=1))


def test_one_changed_weight_is_found(tmp_path: Path) -> None:
    saved_session(tiny_llama(), tmp_path)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight *= 1.01
    with pytest.raises(ValueError, match="other weights"):
        QuantizedPagedCache.from_pretrained(tmp_path, accelerate.cpu_offload(other, torch.device("cpu")))


@pytest.mark.parametrize("way", WAYS)
def test_calibration_and_prefixes(way: str, tmp_path: Path) -> None:
    here, away = tiny_llama(), offloaded(way, tmp_path)
    ids = prompt(2, 30)
    for one, other in zip(calibrate(here, ids, progress=False), calibrate(away, ids, progress=False), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one.k_scale, other.k_scale)
        assert torch.equal(one.v_scale, other.v_scale)
    answers = []
    for model in (here, away):
        prefixes = PrefixCache(model, max_bytes=2**24)
        assert prefixes.prefill(ids[0, :16])
        answers.append(six_tokens(model, ids[:1], prefixes.cache_for(ids[:1])))
    assert torch.equal(*answers)


def test_what_is_measured() -> None:
    """The numbers of the model with its weights in their places, which is what the setup says as well."""
    here, away = (
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="kvquant") for _ in range(2)
    )
    accelerate.cpu_offload(away, torch.device("cpu"))
    results = [
        compare(model, [TEXT], context=32, num_windows=1, new_tokens=2, steps=4, formats=["int8"], retrieval=[64])
        for model in (here, away)
    ]
    ours = [{row.cache: row for row in result.rows}["kvquant int8"] for result in results]
    assert ours[0] == ours[1]
    assert not ours[0].failed
    assert results[0].setup == results[1].setup


def test_times(tmp_path: Path) -> None:
    result = bench(offloaded("cpu_offload", tmp_path), contexts=[15], new_tokens=9, rounds=1, formats=["int8"])
    assert result.setup["device"] == "cpu"
    assert [row.failed for row in result.rows if row.cache == "kvquant int8"] == [""]
