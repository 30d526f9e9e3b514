"""What the cost model decides, and the sizes it decides by; standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How one Gram matrix is formed.

    Attributes:
        algorithm: "hadamard" (one position per sample), "pairs" (of positions) or "explicit" (the
            contributions C_n are formed).
        sample_chunk: Samples per block (pairs), or samples whose C_n are formed at a time (explicit).
        group_chunk: Groups in a chunk of the weight (explicit).
        out_chunk: Outputs per group in a chunk of the weight (explicit).
        in_chunk: Inputs per group in a chunk of the weight (explicit).
        macs: Multiply-adds done.
        bytes_moved: Bytes of inputs and scratch memory that are read and written.
        workspace: Bytes of scratch memory needed, including the library's copies of a convolution's inputs.
        backend: "torch" (matrix products of torch) or "triton" (Triton kernels on a GPU).
        unfolded: Whether a convolution is treated as a linear layer on its patches.
    """

    algorithm: str
    sample_chunk: int
    group_chunk: int
    out_chunk: int
    in_chunk: int
    macs: int
    bytes_moved: int
    workspace: int
    backend: str = "torch"
    unfolded: bool = False


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a layer; a linear layer is a convolution with one group whose pixels are its positions.

    Attributes:
        samples: Samples in the batch.
        pixels: Pixels of one sample's input.
        positions: Pixels of one sample's output.
        inputs: Input channels per group.
        outputs: Output channels per group.
        groups: Groups of channels.
        kernel: Weights that join one input channel and one output channel.
        aspect: Preferred ratio of out_chunk to in_chunk, at which forming contributions is fastest.
        copies: Whether inputs are copied, either to cast them or to gather their pixels.
        size: Bytes of an element in the dtype that sums are kept in.
    """

    samples: int
    pixels: int
    positions: int
    inputs: int
    outputs: int
    groups: int
    kernel: int
    aspect: float
    copies: bool
    size: int

    @property
    def input_bytes(self) -> int:
        """Return the bytes of input and output gradient, in the dtype that sums are kept in."""
        pixels = self.pixels * self.inputs + self.positions * self.outputs
        return self.samples * self.groups * pixels * self.size

    @property
    def weights(self) -> int:
        """Return how many elements the weight has."""
        return self.groups * self.outputs * self.inputs * self.kernel
