# nbdfleece as one process that is not root. Any Debian-like base with Python >= 3.11, venv and pip:
#
#     docker build -t nbdfleece .
#     podman build --format docker -t nbdfleece .      (only that format knows HEALTHCHECK)
#
# What it serves is said by /etc/nbdfleece/nbdfleece.toml, or behind the image's name. docs/containers.md
ARG BASE=docker.io/library/python:3.11-slim

FROM ${BASE} AS build
COPY . /src
# No pip in what is shipped: it installs from outside.
RUN python3 -m venv --without-pip /opt/nbdfleece \
 && python3 -m pip --python /opt/nbdfleece/bin/python install --no-cache-dir /src

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="nbdfleece" \
      org.opencontainers.image.description="NBD server whose disks are read as they were at one instant" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /opt/nbdfleece /opt/nbdfleece
RUN groupadd --gid 10809 nbdfleece \
 && useradd --uid 10809 --gid 10809 --home-dir /var/lib/nbdfleece --no-create-home nbdfleece \
 && install -d -m 0700 -o 10809 -g 10809 /var/lib/nbdfleece /run/nbdfleece \
 && install -d -m 0755 -o 10809 -g 10809 /disks
ENV PATH=/opt/nbdfleece/bin:$PATH \
    XDG_RUNTIME_DIR=/run \
    XDG_STATE_HOME=/var/lib
USER 10809:10809
# State and old data, sockets, disks: all that is written. The root may be read-only.
VOLUME ["/var/lib/nbdfleece", "/run/nbdfleece", "/disks"]
EXPOSE 10809
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s --retries=3 CMD ["nbdfleece", "health", "--quiet"]
ENTRYPOINT ["nbdfleece"]
CMD ["serve", "--config", "/etc/nbdfleece/nbdfleece.toml"]
