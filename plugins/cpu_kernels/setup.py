"""Compile the kernels: a file for each instruction set, with that set's compiler flags. The rest is pyproject.toml."""

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
FLAGS = ["-O2", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall"]
FLAGS += (
    ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"] if sys.platform.startswith("linux") else []
)  # GCC's own AVX-512 headers
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
VNNI = [*AVX512, "-mavx512vnni"]
AMX = [*VNNI, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
# Plain code comes first: of functions of the standard library that several files bring, the linker keeps the first.
SOURCES = {"csrc/library.cpp": [], "csrc/tiled.cpp": [], "csrc/plain.cpp": []}
ATTENTION = {
    "csrc/attention_library.cpp": [],
    "csrc/stack_library.cpp": [],
    "csrc/screen_library.cpp": [],
    "csrc/attention_plain.cpp": [],
}
if X86:
    FLAGS.append("-DCORE_KERNELS_X86")
    SOURCES |= {"csrc/avx2.cpp": AVX2, "csrc/integer_avx2.cpp": AVX2}
    SOURCES |= {"csrc/avx512.cpp": AVX512, "csrc/integer_avx512.cpp": VNNI}
    if sys.platform.startswith("linux") and platform.machine() == "x86_64":
        SOURCES |= {"csrc/amx.cpp": AMX, "csrc/integer_amx.cpp": AMX}  # left out where the compiler is too old for it
    ATTENTION |= {"csrc/attention_avx2.cpp": AVX2, "csrc/attention_avx512.cpp": AVX512}
SOURCES |= ATTENTION
HEADERS = sorted(path.name for path in Path(__file__).parent.glob("csrc/*.h"))


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        """Compile each source by itself, since setuptools gives all sources of an extension the same flags."""
        tiles = "csrc/amx.cpp" in ext.sources and self.accepts(AMX)
        sources = [source for source in ext.sources if tiles or SOURCES[source] is not AMX]

        def compiled(source: str) -> list[str]:
            flags = [*FLAGS, *SOURCES[source], *(["-DCORE_KERNELS_AMX"] if tiles else [])]
            return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects += [made for found in pool.map(compiled, sources) for made in found]
        ext.sources = []
        super().build_extension(ext)

    def accepts(self, flags: list[str]) -> bool:
        """True if the compiler knows these flags: GCC knows AMX since 11, Clang since 12."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.cpp"
            source.write_text("int none;\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True


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
