"""OpenRLHF's own reward server without a GPU. Run by an interpreter that has `openrlhf`, not by the tests'.

It imports flash-attn, which needs CUDA to be built, for packing that it then does not use: empty modules do.
"""

import runpy
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec

for module, names in {
    "flash_attn": [],
    "flash_attn.bert_padding": ["index_first_axis", "pad_input", "rearrange", "unpad_input"],
    "flash_attn.utils": [],
    "flash_attn.utils.distributed": ["all_gather"],
}.items():
    sys.modules[module] = module_from_spec(ModuleSpec(module, None))
    for name in names:
        setattr(sys.modules[module], name, None)

runpy.run_module("openrlhf.cli.serve_rm", run_name="__main__", alter_sys=True)
