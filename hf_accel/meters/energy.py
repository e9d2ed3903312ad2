"""Read the energy counters of devices: NVIDIA's cards through NVML, processors through RAPL.

Only counters are read; nothing is estimated from a load or a nominal power.  Counters of processors cover the whole
machine, whoever uses it.  They wrap around, so read them more often than that (every quarter of an hour or so).

Reference: Linux, Documentation/power/powercap/powercap.rst, for ``energy_uj`` and ``max_energy_range_uj``; NVIDIA, NVML
API, ``nvmlDeviceGetTotalEnergyConsumption``, in millijoules, from Volta on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")

Counter = tuple[Callable[[], int], float, int]
"""Function that reads a counter, joules per count, and the count at which it restarts; 0: never."""


class EnergyMeter:
    """Return the joules since its creation when called.

    Args:
        device: Device of this process; a CUDA device has its own counter.
        machine: Also read the counters of the machine's processors, in one process per machine.
        powercap: Folder of the kernel's counters.
    """

    def __init__(self, device: torch.device, *, machine: bool = True, powercap: Path | None = None):
        powercap = powercap or POWERCAP
        self._counters: list[Counter] = []
        if device.type == "cuda":
            self._counters.append(_card(device))
        if machine and (device.type == "cpu" or _is_readable(powercap)):
            self._counters += _processors(powercap)
        self._joules = 0.0
        self._last = [read() for read, _, _ in self._counters]

    def __call__(self) -> float:
        for i, (read, joules, end) in enumerate(self._counters):
            count = read()
            difference = count - self._last[i]
            self._joules += joules * (difference if difference >= 0 else difference + end)
            self._last[i] = count
        return self._joules


def _processors(powercap: Path) -> list[Counter]:
    """Return the counters of the machine's packages, and of their memory if it has separate ones."""
    counters: list[Counter] = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        name = (zone / "name").read_text().strip()
        if name.startswith("package") or name == "dram":
            file = zone / "energy_uj"
            try:
                file.read_text()
            except PermissionError:
                raise ValueError(f"joules: {file} cannot be read. Ask for permission, or budget time.") from None
            end = int((zone / "max_energy_range_uj").read_text())
            counters.append((lambda file=file: int(file.read_text()), 1e-6, end))
    if not counters:
        raise ValueError(f"joules: this machine counts no energy ({powercap} has no intel-rapl). Budget time instead.")
    return counters


def _is_readable(powercap: Path) -> bool:
    try:
        return bool(_processors(powercap))
    except ValueError:
        return False


def _card(device: torch.device) -> Counter:
    """Return the counter of a CUDA device."""
    try:
        import pynvml
    except ImportError:
        raise ValueError("joules: nvidia-ml-py is not installed. Install it: pip install 'hf-accel[energy]'.") from None
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except pynvml.NVMLError as error:
        raise ValueError(f"joules: {device} counts no energy ({error}). Budget time instead.") from None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card), 1e-3, 0
