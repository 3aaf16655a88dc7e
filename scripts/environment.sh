# Create or update the environment .venv with the package. Other scripts source this file from the repository root.
# The argument is the requirement for pip: "." is the package, ".[dev]" adds the tools for tests and CI.
if [ ! -x .venv/bin/python ]; then
  echo "Creating a Python environment in .venv (once, 5 seconds)"
  "${PYTHON:-python3}" -m venv .venv
fi
source .venv/bin/activate

pip_install() {
  python -m pip install --disable-pip-version-check --constraint constraints.txt "$@"
}

# On Linux pip's default build of torch contains CUDA. Without an NVIDIA GPU the CPU build is enough: from a folder of
# wheels that pip knows (PIP_FIND_LINKS), or from PyTorch's own index, which uv knows.
install_torch() {
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "Installing PyTorch with CUDA: a download of about 2.8 GB"
  elif [ "$(uname -s)" != Linux ]; then
    echo "Installing PyTorch: a download of about 100 MB"
  elif pip_install --no-index --no-deps torch 2>/dev/null; then
    return
  else
    echo "Found no NVIDIA GPU. Installing the CPU build of PyTorch: a download of about 200 MB"
    pip_install --quiet uv
    if UV_HTTP_RETRIES=1 uv pip install --torch-backend cpu --no-deps --constraint constraints.txt torch; then
      return
    fi
    echo "PyTorch's index of CPU builds gave an error (above). Installing the default build instead: it runs without a"
    echo "GPU too, but contains CUDA, a download of about 2.8 GB. To avoid it, put a CPU wheel of torch into a folder and"
    echo "set PIP_FIND_LINKS to that folder."
  fi
  pip_install torch
}

# Install again when the list of dependencies has changed.
if ! cmp -s <(cat pyproject.toml constraints.txt) ".venv/installed$1"; then
  install_torch
  echo "Installing linear_llama3 and its dependencies: a download of about 450 MB, one to five minutes"
  pip_install --editable "$1"
  cat pyproject.toml constraints.txt | tee .venv/installed. >".venv/installed$1"
fi
