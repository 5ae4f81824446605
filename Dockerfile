# diffalign for NVIDIA GPUs:  docker build -t diffalign .
# For CPUs only (without CUDA's libraries):  docker build -t diffalign:cpu --build-arg TORCH=cpu .
# docs/container.md shows how to run it.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Wheels of torch bring CUDA's libraries, so the base needs none; the driver comes from the host.
ARG TORCH=cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/diffalign
ENV PATH=/opt/diffalign/bin:$PATH
# hadolint ignore=DL3013 # pyproject.toml has the bounds
RUN if [ "$TORCH" = cpu ]; then \
      pip install "torch>=2.11" torchvision --index-url https://download.pytorch.org/whl/cpu; \
    else \
      pip install "torch>=2.11" torchvision; \
    fi

# There is no .git in the build, so the version is given, or the fallback_version of pyproject.toml.
ARG VERSION=
ARG EXTRAS=all
WORKDIR /src
COPY . .
# hadolint ignore=DL3013
RUN if [ -n "$VERSION" ]; then export SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION"; fi \
    && pip install ".[${EXTRAS}]"

FROM python:${PYTHON}-slim
# A user of its own: files that a command writes do not belong to root.
RUN useradd --create-home --uid 1000 diffalign
COPY --from=build /opt/diffalign /opt/diffalign
ENV PATH=/opt/diffalign/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache
RUN mkdir /cache /work && chown 1000 /cache /work
USER 1000
WORKDIR /work
VOLUME ["/cache"]
ENTRYPOINT ["diffalign"]
CMD ["--help"]
