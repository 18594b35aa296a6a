from codefuse_triton.triton_io import TokenizerModel as TritonPythonModel  # noqa: F401
