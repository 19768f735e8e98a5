# syntax=docker/dockerfile:1
# The sidecar alone: docker build --file deploy/docker/sidecar.Dockerfile --tag adaptive-spec-sidecar .
# The base is named by its version, for its security fixes. To pin it: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adaptive_spec ./adaptive_spec
COPY dashboards/*.json ./dashboards/
# Needed by profile_store. For object storage add its fsspec package, for example --build-arg STORAGE_PACKAGE=s3fs
ARG STORAGE_PACKAGE=fsspec
RUN python -m venv /opt/adaptive-spec \
    && /opt/adaptive-spec/bin/pip install --no-cache-dir --disable-pip-version-check ".[store]" "${STORAGE_PACKAGE}"

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/adaptive-spec /opt/adaptive-spec
# The same user as the server's: the shared memory has mode 0700.
RUN useradd --uid 1000 --user-group --no-create-home --shell /usr/sbin/nologin adaptive-spec
USER 1000:1000
# The plots of a profile are drawn with matplotlib, which needs a folder for its font cache.
ENV PATH=/opt/adaptive-spec/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib
EXPOSE 9477
# By the heartbeat file in runtime_dir: no client of the port can keep it waiting, and it works with TLS.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["adaptive-spec", "doctor", "--alive", "--runtime-dir", "/run/adaptive-spec/run"]
ENTRYPOINT ["adaptive-spec"]
CMD ["sidecar", "--config", "/etc/adaptive-spec/config.yaml"]
