"""A machine for PTX: what Triton compiles for an NVIDIA GPU, run on the CPU and checked as it runs.

It computes what a GPU has to, and finds what a GPU may forgive: accesses outside of tensors, unaligned ones, shared
memory that one thread reads while another may write it, copies that are used before they are waited for. It knows the
instructions that this project's kernels are made of, and refuses others by name. It says nothing about time.
"""
