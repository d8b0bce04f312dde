"""The operators in C++, compiled on the user's machine for its own instruction set."""
