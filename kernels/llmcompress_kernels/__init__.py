"""Fast products with factorised weights, as torch custom operators; depends on torch, triton and numba alone."""

from llmcompress_kernels.block import block_dense_linear, block_shuffle_linear
from llmcompress_kernels.dispatch import use
from llmcompress_kernels.low_rank import low_rank_linear
from llmcompress_kernels.sparse_dictionary import sparse_dictionary_linear

__all__ = ["block_dense_linear", "block_shuffle_linear", "low_rank_linear", "sparse_dictionary_linear", "use"]
