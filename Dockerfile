# A server of one world:
#
#   docker build --tag scd .
#   docker run --rm -p 127.0.0.1:8000:8000 -v ./token.txt:/token:ro scd --token-file /token
#
# What follows the name of the image are flags of `scd serve`; --run NAME serves a folder of /worlds.
# compose.yaml has the rest: a folder of sessions that stays, a file system that is only read.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
# Which build of torch: without GPU, or such as https://download.pytorch.org/whl/cu128.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint /constraints.txt \
        --extra-index-url "$TORCH_INDEX" /wheels/*.whl \
    && useradd --uid 10001 --no-create-home scd \
    && install --directory --owner scd /sessions
USER 10001
WORKDIR /worlds
VOLUME /sessions
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
# Bound to all addresses of the container, since its ports are opened from outside; that needs a
# token, which only the user can give. SIGTERM reaches the server itself, which then writes its
# sessions.
ENTRYPOINT ["scd", "serve", "--host", "0.0.0.0", "--allow-remote", "--evict-dir", "/sessions"]
