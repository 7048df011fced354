"""The Triton kernels of the back-end `composite`. Not yet run on a GPU."""
