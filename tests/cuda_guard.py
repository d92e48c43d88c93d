"""A guard of CUDA devices that does nothing, which a CPU build of torch lacks; loaded when this module is imported.

Without one nothing moves to `cuda`, and no gradient is reckoned there. It must be there before torch is imported.
"""

import ctypes
import os
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
namespace {
const Device here(DeviceType::CUDA, 0);
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return here; }
  Device getDevice() const override { return here; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, here); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, here); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, here); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
static impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new Guard());
}
namespace at {
struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
static c10::Registerer<std::string, std::unique_ptr<CUDAHooksInterface>, CUDAHooksArgs> registered(
    "CUDAHooks", CUDAHooksRegistry(),
    c10::Registerer<std::string, std::unique_ptr<CUDAHooksInterface>, CUDAHooksArgs>::DefaultCreator<Hooks>);
}
"""


def build_guard() -> Path:
    """The compiled guard, made once for an installation of torch."""
    torch_at = Path(find_spec("torch").origin).parent  # this does not import it
    made = int((torch_at / "version.py").stat().st_mtime)
    library = Path(tempfile.gettempdir(), f"fake-cuda-guard-{os.getuid()}-{made}.so")
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            source, built = Path(folder, "guard.cpp"), Path(folder, "guard.so")
            source.write_text(GUARD)
            torch_has = [f"-I{torch_at}/include", f"-L{torch_at}/lib", f"-Wl,-rpath,{torch_at}/lib"]
            options = ["-O0", "-std=c++20", "-shared", "-fPIC", *torch_has, "-lc10", "-ltorch_cpu"]
            subprocess.run(["g++", str(source), "-o", str(built), *options], check=True)
            built.replace(library)
    return library


ctypes.CDLL(str(build_guard()), mode=ctypes.RTLD_GLOBAL)
