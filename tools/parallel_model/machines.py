"""The devices and the links that the model assumes, and how long things take on them."""

from __future__ import annotations

from dataclasses import dataclass

from tools.parallel_model.counts import Counted

# AdamW reads a parameter, its gradient and two moments, and writes all but the gradient.
ADAMW_ACCESSES = 7


@dataclass(frozen=True)
class Link:
    """A connection of a device, with a bandwidth in bytes a second in each direction.

    Attributes:
        bandwidth: that is reached.
        latency: of a message, in seconds.
    """

    bandwidth: float
    latency: float

    def seconds(self, size: float) -> float:
        """Return the seconds that a message of so many bytes takes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Machines with as many equal devices each.

    Attributes:
        name: as the page calls it.
        machines: their number.
        devices: in each machine.
        flops: floating-point operations a second that matrix products and convolutions reach.
        memory_bandwidth: of a device, in bytes a second, that other operations reach.
        launch: seconds that an operation takes at least.
        memory: of a device, in bytes.
        inside: the link of a device to others in its machine.
        between: the link of a device to other machines.
    """

    name: str
    machines: int
    devices: int = 8
    flops: float = 0.5 * 495e12
    memory_bandwidth: float = 0.8 * 3.35e12
    launch: float = 5e-6
    memory: float = 80e9
    inside: Link = Link(0.8 * 450e9, 10e-6)
    between: Link = Link(0.9 * 50e9, 20e-6)

    @property
    def all_devices(self) -> int:
        return self.machines * self.devices

    def compute(self, counted: Counted, samples: float) -> float:
        """Return the seconds of counted work on so many samples."""
        arithmetic = counted.flops.at(samples) / self.flops
        memory = counted.moved.at(samples) / self.memory_bandwidth
        return max(arithmetic + memory, counted.kernels.at(samples) * self.launch)

    def optimizer(self, parameter_bytes: float) -> float:
        """Return the seconds of a step of AdamW."""
        return self.launch + ADAMW_ACCESSES * parameter_bytes / self.memory_bandwidth

    def all_reduce(self, size: float) -> float:
        """Return the seconds of a sum over all devices.

        Inside a machine the devices add a share each. These shares go around the machines, and come
        together inside each machine again. Chunks overlap, so the slower of the two counts.
        """
        inside = _on_ring(size, self.devices, self.inside)
        between = _on_ring(size / self.devices, self.machines, self.between)
        return max(inside, between)

    def all_gather(self, size: float) -> float:
        """Return the seconds to gather, or to reduce and scatter: half of a sum."""
        return self.all_reduce(size) / 2

    def all_reduce_between(self, size: float) -> float:
        """Return the seconds of a sum over the devices with the same place in each machine."""
        return _on_ring(size, self.machines, self.between)


def _on_ring(size: float, processes: int, link: Link) -> float:
    if processes == 1:
        return 0.0
    # Latency as in a tree, which libraries use for small sums.
    hops = 2 * (processes - 1).bit_length()
    share = 2 * (processes - 1) / processes
    return share * size / link.bandwidth + hops * link.latency


ONE_MACHINE = Cluster("8 devices", machines=1)
MANY_MACHINES = Cluster("64 machines of 8", machines=64)
