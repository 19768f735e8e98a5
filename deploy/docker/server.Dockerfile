# syntax=docker/dockerfile:1
# An SGLang server with the plugin: docker build --file deploy/docker/server.Dockerfile --tag sglang-adaptive-spec .
# The plugin is inactive until ADAPTIVE_SPEC_MODE is shadow or active, or ADAPTIVE_SPEC_CONFIG names a configuration.
# The bases are named by their versions, for their security fixes. To pin them: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim
ARG SGLANG_IMAGE=lmsysorg/sglang:v0.5.23
FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adaptive_spec ./adaptive_spec
COPY dashboards/*.json ./dashboards/
RUN pip wheel --no-cache-dir --no-deps --disable-pip-version-check --wheel-dir /wheels .

FROM ${SGLANG_IMAGE}
COPY --from=build /wheels /tmp/wheels
# Without dependencies, to leave SGLang's environment unchanged. The plugin needs numpy, pydantic and PyYAML, which SGLang has;
# the last command fails the build if one is missing.
RUN pip install --no-cache-dir --no-deps --disable-pip-version-check /tmp/wheels/*.whl \
    && rm -rf /tmp/wheels \
    && python3 -c "import adaptive_spec.config.load, adaptive_spec.engines.sglang.plugin"
ENV HF_HOME=/models/huggingface
EXPOSE 30000
ENTRYPOINT ["python3", "-m", "sglang.launch_server"]
