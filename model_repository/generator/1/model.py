from codefuse_triton.triton_io import GeneratorModel as TritonPythonModel  # noqa: F401
