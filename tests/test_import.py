"""What importing the package does to a process, each time in a fresh one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import hf_kvquant

PACKAGE_PARENT = str(Path(hf_kvquant.__file__).parents[1])


def run(code: str) -> str:
    """The output of `code` in a new interpreter. Fails with its traceback."""
    path = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Everything of the host that the package touches.
HOST = """
import torch, transformers
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.generation import configuration_utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
"""


def test_import_only_adds() -> None:
    run(
        HOST
        + """
import functools, random, sys, warnings

def state():
    return {
        "attention": {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()},
        "mask": {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()},
        "cache": {name: True for name in configuration_utils.ALL_CACHE_IMPLEMENTATIONS},
        "generation": {name: vars(GenerationMixin)[name] for name in vars(GenerationMixin)},
    }

before = state()
triton = {name for name in sys.modules if name.split(".")[0] == "triton"}
settings = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state().tolist(),
                    random.getstate(), torch.is_grad_enabled(), list(warnings.filters))
process = settings()

import hf_kvquant

assert not torch.cuda.is_initialized()
assert {name for name in sys.modules if name.split(".")[0] == "triton"} == triton
assert settings() == process
after = state()
added = {kind: set(after[kind]) - set(before[kind]) for kind in before}
names = {"kvquant", "kvquant_fp8", "kvquant_fp8_e4m3", "kvquant_fp8_e5m2", "kvquant_int8"}
methods = {"init_continuous_batching"}  # of a base class before
assert added == {"attention": names, "mask": names, "cache": {"kvquant"}, "generation": methods}, added
for kind in before:
    changed = {name for name in before[kind] if after[kind][name] is not before[kind][name]}
    assert changed == ({"_prepare_cache_for_generation"} if kind == "generation" else set()), changed
order = [name for name in configuration_utils.ALL_CACHE_IMPLEMENTATIONS if name != "kvquant"]
assert order == list(before["cache"])

# Twice is once.
hf_kvquant.register()
hf_kvquant.register()
again = state()
for kind in after:
    assert list(again[kind]) == list(after[kind])
    assert all(again[kind][name] is after[kind][name] for name in after[kind]), kind
assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("kvquant") == 1

# Another package may wrap what this one wrapped.
ours = GenerationMixin._prepare_cache_for_generation

@functools.wraps(ours)
def theirs(self, *args, **kwargs):
    return ours(self, *args, **kwargs)

GenerationMixin._prepare_cache_for_generation = theirs
hf_kvquant.register()
assert GenerationMixin._prepare_cache_for_generation is theirs
assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("kvquant") == 1
"""
    )


def test_public_names() -> None:
    assert len(set(hf_kvquant.__all__)) == len(hf_kvquant.__all__)
    assert not [name for name in hf_kvquant.__all__ if not hasattr(hf_kvquant, name)]


UNKNOWN_HOSTS = {
    "another signature": "GenerationMixin._prepare_cache_for_generation = lambda self, config, **kwargs: None",
    "no method": "del GenerationMixin._prepare_cache_for_generation",
    "no names": "del configuration_utils.ALL_CACHE_IMPLEMENTATIONS",
    "names of another type": "configuration_utils.ALL_CACHE_IMPLEMENTATIONS = {}",
}


def test_an_unknown_host_is_refused_and_left_alone() -> None:
    code = HOST
    for name, change in UNKNOWN_HOSTS.items():
        code += f"""
saved = (GenerationMixin._prepare_cache_for_generation, configuration_utils.ALL_CACHE_IMPLEMENTATIONS)
{change}
state = lambda: (
    getattr(GenerationMixin, "_prepare_cache_for_generation", None),
    getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", None),
    list(ALL_ATTENTION_FUNCTIONS.valid_keys()),
    list(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
)
before = state()
try:
    import hf_kvquant
except RuntimeError as error:
    message = str(error)
else:
    raise SystemExit({name!r} + " was accepted")
assert "transformers " + transformers.__version__ in message, message
assert "_prepare_cache_for_generation" in message and "ALL_CACHE_IMPLEMENTATIONS" in message, message
assert ">= 5.17" in message, message
assert state() == before, {name!r}
GenerationMixin._prepare_cache_for_generation, configuration_utils.ALL_CACHE_IMPLEMENTATIONS = saved
"""
    code += """
import hf_kvquant  # on a host it knows a failed import has broken nothing
assert configuration_utils.ALL_CACHE_IMPLEMENTATIONS.count("kvquant") == 1
assert "kvquant" in ALL_ATTENTION_FUNCTIONS.valid_keys()
"""
    run(code)
