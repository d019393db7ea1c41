# ACE Music Studio in a container; docs/docker.md says how to use it.
#
# TORCH_INDEX is the address of one of PyTorch's package indices, as its install page shows it for the
# CPU, CUDA or ROCm. Without it pip's own build comes, which runs on the CPU and on NVIDIA cards. The
# builds for cards bring their libraries; the machine needs only its driver.
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN python -m venv /opt/studio
ENV PATH=/opt/studio/bin:$PATH

WORKDIR /app
# Dependencies first: this layer stays for as long as these two files do.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['mcp'], sep='\n')" > /tmp/requirements.txt \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint constraints.txt --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY . .

# Nothing runs as root. Models and what the studio learns are in the volume, which is this user's.
RUN useradd --create-home --uid 1000 studio \
    && mkdir -p /models \
    && chown studio:studio /models
USER studio
ENV HF_HOME=/models/huggingface XDG_CACHE_HOME=/models/cache
VOLUME /models

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=10s --start-period=3m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen(u.Request('http://127.0.0.1:7860/', method='HEAD'), timeout=9)"]

# Not through a shell: the studio gets the signals itself, and stops at once.
ENTRYPOINT ["python", "app.py", "--host", "0.0.0.0", "--port", "7860"]
