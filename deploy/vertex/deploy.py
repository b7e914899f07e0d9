"""Upload a model to Vertex AI, deploy it to an endpoint of its own, and ask it something: see README.md.

python deploy/vertex/deploy.py --project P --region europe-west4 --bucket B --image IMAGE MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HEALTH, PREDICT, PORT = "/health", "/predict", 8080


def container(image: str) -> dict[str, Any]:
    """What Vertex AI is to know of the image."""
    return {
        "serving_container_image_uri": image,
        "serving_container_health_route": HEALTH,
        "serving_container_predict_route": PREDICT,
        "serving_container_ports": [PORT],
        "serving_container_deployment_timeout": 1800,  # seconds to copy the weights and load them
    }


def machine(machine_type: str, accelerator: str | None, replicas: int) -> dict[str, Any]:
    """What it is to run on. Replicas are added while requests wait: it reads vllm:num_requests_waiting of /metrics."""
    made: dict[str, Any] = {
        "machine_type": machine_type,
        "min_replica_count": 1,
        "max_replica_count": replicas,
        "deploy_request_timeout": 3600,
    }
    if accelerator is not None:
        made |= {"accelerator_type": accelerator, "accelerator_count": 1}
        made |= {"autoscaling_target_accelerator_duty_cycle": 60}
    else:
        made |= {"autoscaling_target_cpu_utilization": 70}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a model folder: griffin.save's, or a snapshot of the Hub's")
    for name in ("project", "region", "bucket", "image"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--machine", default="g2-standard-8")
    parser.add_argument("--accelerator", default="NVIDIA_L4", help="none for a CPU machine")
    parser.add_argument("--replicas", type=int, default=1, help="the most there may be")
    options = parser.parse_args()

    from google.cloud import aiplatform, storage

    name = options.folder.resolve().name
    bucket = storage.Client(project=options.project).bucket(options.bucket)
    for file in sorted(options.folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".model", ".jinja") or file.name == "SHA256SUMS":
            bucket.blob(f"models/{name}/{file.name}").upload_from_filename(str(file), checksum="crc32c")
    aiplatform.init(project=options.project, location=options.region)
    model = aiplatform.Model.upload(
        display_name=name, artifact_uri=f"gs://{options.bucket}/models/{name}", **container(options.image)
    )
    endpoint = aiplatform.Endpoint.create(display_name=name, dedicated_endpoint_enabled=True)
    accelerator = None if options.accelerator == "none" else options.accelerator
    model.deploy(endpoint=endpoint, **machine(options.machine, accelerator, options.replicas))
    body = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}
    answer = endpoint.raw_predict(
        body=json.dumps(body).encode(), headers={"content-type": "application/json"}, use_dedicated_endpoint=True
    )
    print(endpoint.resource_name)
    print(answer.text)


if __name__ == "__main__":
    main()
