"""Models that are spread over processes, or copied into each: two processes once, and what each of them has found."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import prompt, tiny_llama
from safetensors import safe_open
from saving import saved_session, six_tokens
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from two_processes import in_two_processes

from hf_kvquant import PrefixCache, QuantizedPagedCache, calibrate

UNCHECKED = "could not be checked"


def refusal(directory: Path, model: Any) -> str:
    try:
        QuantizedPagedCache.from_pretrained(directory, model)
    except ValueError as error:
        return str(error)
    return ""


def model_on_disk(directory: Path) -> LlamaForCausalLM:
    model = tiny_llama(vocab_size=128)
    model.save_pretrained(directory)
    return model


# -- what each process does -----------------------------------------------------------------------------------------


def _both(directory: Path) -> dict[str, Any]:
    return {**_tensor_parallel(directory), **_fully_sharded(directory), **_data_parallel(directory)}


def _loaded(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory / "model", attn_implementation="kvquant", dtype=torch.float32, **options
    ).eval()


def _tensor_parallel(directory: Path) -> dict[str, Any]:
    model, session = _loaded(directory, tp_plan="auto"), directory / "session"
    cache, text = saved_session(model, session)
    torch.distributed.barrier()
    loaded = QuantizedPagedCache.from_pretrained(session, model)
    kept, restored = six_tokens(model, text, cache), six_tokens(model, text, loaded)
    rank = torch.distributed.get_rank()
    swapped = directory / f"swapped{rank}"
    swapped.mkdir()
    shutil.copy(session / f"kv_cache-{1 - rank}-of-2.safetensors", swapped / f"kv_cache-{rank}-of-2.safetensors")
    found = {
        "heads": loaded.layers[0].k.num_heads,
        "kept": kept.tolist(),
        "restored": restored.tolist(),
        "notes": loaded.report().notes,
        "another's file": refusal(swapped, model),
        "a file of one process": refusal(directory / "one", model),
    }
    model_of_its_own = _loaded(directory, tp_plan="auto")
    orphan = QuantizedPagedCache.from_model(model_of_its_own)
    six_tokens(model_of_its_own, text, orphan)
    del model_of_its_own
    gc.collect()
    orphan.save_pretrained(directory / "orphan")
    torch.distributed.barrier()
    found["of a model that is gone"] = sorted(path.name for path in (directory / "orphan").iterdir())
    with torch.no_grad():  # of one process only: what the other holds is as it was
        if rank == 1:
            model.model.layers[1].self_attn.v_proj.weight.to_local().mul_(2)
    return {**found, "other weights": refusal(session, model)}


def _fully_sharded(directory: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def sharded(factor: float = 1.0) -> Any:
        model = _loaded(directory)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight *= factor
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    session = directory / f"sharded{torch.distributed.get_rank()}"
    model = sharded()
    cache, text = saved_session(model, session)  # which leaves some of its weights whole
    fresh = sharded()
    loaded = QuantizedPagedCache.from_pretrained(session, fresh)
    return {
        "sharded": torch.equal(six_tokens(fresh, text, loaded), six_tokens(model, text, cache)),
        "sharded, notes": loaded.report().notes,
        "sharded, other weights": refusal(session, sharded(1.01)),
        "sharded otherwise": QuantizedPagedCache.from_pretrained(directory / "one", sharded()).report().notes,
    }


def _data_parallel(directory: Path) -> dict[str, Any]:
    model = _loaded(directory)
    copied = torch.nn.parallel.DistributedDataParallel(model)
    # As many texts as it likes: the processes do not wait for each other.
    texts = prompt(1 + torch.distributed.get_rank(), 30, vocab_size=128)
    scales = [calibrate(each, texts, progress=False)[1].k_scale for each in (copied, model)]
    prefixes = PrefixCache(copied, max_bytes=2**24)
    return {"copied": torch.equal(*scales), "prefix": prefixes.prefill(texts[:1]) and len(prefixes)}


# -- what is expected -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processes")
    saved_session(model_on_disk(directory / "model"), directory / "one")
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> list[dict[str, Any]]:
    return in_two_processes(_both, directory)


def test_each_process_reads_the_heads_that_it_has_written(found: list[dict[str, Any]], directory: Path) -> None:
    names = [f"kv_cache-{rank}-of-2.safetensors" for rank in range(2)]
    assert sorted(path.name for path in (directory / "session").iterdir()) == names
    for rank, results in enumerate(found):
        with safe_open(directory / "session" / names[rank], framework="pt") as file:
            assert json.loads(file.metadata()["hf_kvquant"])["part"] == [rank, 2]
            assert file.get_slice("layers.0.k.pages").get_shape()[1] == results["heads"] == 1
        assert results["restored"] == results["kept"] == found[0]["kept"]
        assert not [note for note in results["notes"] if UNCHECKED in note]


def test_what_tensor_parallelism_cannot_read_is_refused(found: list[dict[str, Any]], directory: Path) -> None:
    for rank, results in enumerate(found):
        assert f"written by process {1 - rank} of 2, and this is process {rank} of 2" in results["another's file"]
        assert f"has kv_cache.safetensors but no kv_cache-{rank}-of-2.safetensors" in results["a file of one process"]
    with pytest.raises(ValueError, match="but no kv_cache.safetensors: .*as many processes .*this is process 0 of 1"):
        QuantizedPagedCache.from_pretrained(directory / "session", tiny_llama(vocab_size=128))


def test_weights_of_which_a_process_holds_a_part_are_compared(found: list[dict[str, Any]]) -> None:
    assert [results["other weights"] == "" for results in found] == [True, False]
    assert "other weights" in found[1]["other weights"]
    for results in found:
        assert results["sharded"]
        assert not [note for note in results["sharded, notes"] if UNCHECKED in note]
        assert "other weights" in results["sharded, other weights"]


def test_weights_that_cannot_be_compared_are_noted(found: list[dict[str, Any]]) -> None:
    for results in found:
        assert len([note for note in results["sharded otherwise"] if UNCHECKED in note]) == 1


def test_each_has_its_file_when_the_model_is_gone(found: list[dict[str, Any]]) -> None:
    names = [f"kv_cache-{rank}-of-2.safetensors" for rank in range(2)]
    assert [results["of a model that is gone"] for results in found] == [names, names]


def test_data_parallelism_is_taken_off(found: list[dict[str, Any]]) -> None:
    for results in found:
        assert results["copied"]
        assert results["prefix"] == 1


def test_data_parallelism_of_one_process_is_taken_off(directory: Path) -> None:
    model = tiny_llama()
    copied, ids = torch.nn.DataParallel(model), prompt(2, 20)
    scales = [calibrate(each, ids, progress=False)[1].v_scale for each in (copied, model)]
    assert torch.equal(*scales)
    assert PrefixCache(copied, max_bytes=2**24).prefill(ids[:1])


def test_what_is_no_model_is_refused() -> None:
    for take in (lambda: calibrate(torch.nn.Linear(2, 2), prompt()), lambda: PrefixCache(torch.nn.Linear(2, 2), 2**20)):
        with pytest.raises(TypeError, match="Linear is no transformers model"):
            take()
