# syntax=docker/dockerfile:1
# One image for the worker, beat and Flower; the command decides. `docker build .`
# The vCenter simulator for the tests and for docker-compose.yml: `docker build --target vcsim .`

FROM golang:1.26-bookworm AS vcsim-build
WORKDIR /src
COPY ssvm_worker/demo/vcsim/ ./
RUN CGO_ENABLED=0 go build -o /vcsim . && mkdir /tls \
    && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj /CN=vcsim \
        -addext subjectAltName=DNS:vcsim,DNS:localhost -keyout /tls/key.pem -out /tls/cert.pem

FROM debian:bookworm-slim AS vcsim
COPY --from=vcsim-build /vcsim /usr/local/bin/vcsim
COPY --from=vcsim-build --chown=65534 /tls/ /run/vcsim/
USER 65534
EXPOSE 8989
ENTRYPOINT ["vcsim"]

FROM python:3.13-slim-bookworm AS build
RUN pip install --no-cache-dir 'uv>=0.9,<1'
WORKDIR /src
ENV UV_PROJECT_ENVIRONMENT=/opt/ssvm UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
# The dependencies change rarely, so they have their own layer.
COPY pyproject.toml uv.lock ./
RUN uv sync --locked --no-default-groups --all-extras --no-extra embedded --no-extra demo --no-install-project
COPY README.md LICENSE ./
COPY config/ config/
COPY ssvm_worker/ ssvm_worker/
COPY tasks/ tasks/
RUN uv sync --locked --no-default-groups --all-extras --no-extra embedded --no-extra demo --no-editable

FROM python:3.13-slim-bookworm AS worker
# qemu-img converts images if download.scratch_dir is set. gpgv verifies checksum files if download.keyring is set.
# nfs-common mounts nfs:// stores if the container runs as root with CAP_SYS_ADMIN (docs/how-to/nfs.md).
# No versions: Debian's archive has only the newest one.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends qemu-utils gpgv nfs-common && rm -rf /var/lib/apt/lists/*
# This user owns the files of directory stores. The export must use the same uid.
RUN groupadd --gid 10001 ssvm \
    && useradd --no-log-init --uid 10001 --gid ssvm --home-dir /var/lib/ssvm --create-home ssvm \
    && mkdir -p /srv/secondary && chown ssvm:ssvm /srv/secondary
COPY --from=build /opt/ssvm /opt/ssvm
COPY config/ /etc/ssvm/
ENV PATH=/opt/ssvm/bin:$PATH PYTHONUNBUFFERED=1 SSVM_CONFIG=/etc/ssvm/worker.toml
USER 10001
WORKDIR /var/lib/ssvm
# The exec form sends SIGTERM to the worker itself, which then drains. Use `--init` to reap orphaned processes.
CMD ["ssvm", "worker"]
