"""The kernels in C++, and what they are built of."""
