"""flash-attn 2's functions, on this library's kernels: its names, argument order, defaults and conventions, on a CPU.

    import genai_kernels.integrations.flash_attn as flash_attn

runs code written for flash-attn, gradients included. For packages that import flash_attn themselves, before they do:

    import sys
    sys.modules["flash_attn"] = flash_attn

What differs, beyond the device: float32 and float64 work too, and head dimensions of any size; a row that sees no key
has lse -inf (flash-attn: +inf on some of its paths); results and gradients are always the same from run to run, so that
`deterministic` changes nothing; dropout draws other random numbers than a GPU does. What cannot be done raises.
"""

from genai_kernels.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # the flash-attn whose interface this is; packages compare it to choose their calls

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
