"""C++ sources of the fabric and what builds them."""
