from codefuse_triton.triton_io import DetokenizerModel as TritonPythonModel  # noqa: F401
