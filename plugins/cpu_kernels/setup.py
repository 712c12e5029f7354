"""Compile the kernels: a file for each instruction set, with that set's compiler flags. The rest is pyproject.toml."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
FLAGS = ["-O2", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall"]
FLAGS += (
    ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"] if sys.platform.startswith("linux") else []
)  # GCC's own AVX-512 headers
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Plain code comes first: of functions of the standard library that several files bring, the linker keeps the first.
SOURCES = {"csrc/library.cpp": [], "csrc/plain.cpp": []}
ATTENTION = {"csrc/attention_library.cpp": [], "csrc/attention_plain.cpp": []}
if X86:
    FLAGS.append("-DCORE_KERNELS_X86")
    SOURCES |= {"csrc/avx2.cpp": AVX2, "csrc/avx512.cpp": AVX512, "csrc/integer_avx512.cpp": [*AVX512, "-mavx512vnni"]}
    ATTENTION |= {"csrc/attention_avx2.cpp": AVX2, "csrc/attention_avx512.cpp": AVX512}
SOURCES |= ATTENTION
HEADERS = sorted(path.name for path in Path(__file__).parent.glob("csrc/*.h"))


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        """Compile each source by itself, since setuptools gives all sources of an extension the same flags."""
        for source in ext.sources:
            flags = [*FLAGS, *SOURCES[source]]
            ext.extra_objects += self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)
        ext.sources = []
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "core_cpu_kernels._kernels",  # loaded with ctypes; it knows nothing of Python
            list(SOURCES),
            depends=[f"csrc/{header}" for header in HEADERS],
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
