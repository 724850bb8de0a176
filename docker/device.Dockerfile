# The device's side on an image with CUDA (nvcc) and TensorRT with its Python bindings.  Not yet built on hardware.
#   docker build -f docker/device.Dockerfile --build-arg BASE=IMAGE -t inflight-edge .
# docs/jetson.md names the images for JetPack 6, JetPack 7 and a PC's GPU.
ARG BASE
FROM ${BASE}

ENV DEBIAN_FRONTEND=noninteractive PATH=/usr/local/cuda/bin:/opt/inflight/bin:${PATH}
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ make python3-dev python3-venv python3-gi gir1.2-gstreamer-1.0 \
      gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good \
 && rm -rf /var/lib/apt/lists/*

# The base image's TensorRT bindings are the system's: a virtual environment must see them.
RUN python3 -m venv --system-site-packages /opt/inflight
COPY . /src
# 1: an image without the CUDA scorer would fail on the device only.
RUN INFLIGHT_EDGE_CUDA=1 /opt/inflight/bin/pip install --no-cache-dir '/src[onnxruntime,camera,cuda]' && rm -rf /src

RUN useradd --create-home --groups video inflight
USER inflight
# Plans and timing caches are made on the device: a volume keeps them.
ENV XDG_CACHE_HOME=/plans
VOLUME /plans
ENTRYPOINT ["inflight-edge"]
CMD ["doctor"]
