"""A MONAI Label app around `equireg.register`: both images are chosen by their ids in the datastore.

`register` gives the moved image, the transforms and a report; it is of type "others", which 3D Slicer's panel hides.
`propagate` gives the label of the moving image on the fixed one, a segmentation that the panel can show.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

import equireg
from equireg.lists import result_name
from equireg.registration import Registrar
from equireg.results import EXPORTS, check_results, save_registration


class RegistrationTask(InferTask):
    """Register one image of the datastore to another.

    A request holds the ids `moving` and `fixed`, and perhaps options of `equireg.register`, `exports`, and as `answer`
    the result to send, such as "fixed_to_moving". Final labels of the images come along. Requests share no file, and
    what is wrong with one is answered with status 400 and one sentence.

    Args:
        datastore: where the images are.
        folder: where results go, one folder per request.
        weights: name or path of the weights that a request gets if it names none.
        output: the result to send if a request does not say, "moved" or "moved_label".
        type: what MONAI Label's clients take the result for.
        description: what they say of it.
    """

    def __init__(
        self, datastore: Datastore, folder: Path, weights: str, output: str, type: InferType, description: str
    ) -> None:
        super().__init__(type, None, equireg.load_network(weights).spatial_dims, description)
        self.datastore, self.folder, self.weights, self.output = datastore, folder, weights, output

    def is_valid(self) -> bool:
        """Say that the task is ready: the weights were loaded once."""
        return True

    def config(self) -> dict[str, Any]:
        """Return the options that clients offer: a list is a choice."""
        return {"moving": self.datastore.list_images(), "weights": self.weights, "optimize": 0, "background": 0.0}

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return a file, which the server deletes once it is sent, and the report with the paths of all results."""
        try:
            sources, exports = self._sources(request), self._exports(request)
            options = {name: request[name] for name in Registrar.OPTIONS if name in request}
            result = equireg.register(**sources, **{"weights": self.weights, **options})
        except (ValueError, FileNotFoundError, ImportError) as error:
            raise HTTPException(400, str(error)) from error
        name = result_name([sources["moving"], sources["fixed"]])
        folder = self.folder / f"{name}_{uuid.uuid4().hex}"  # others may ask for this pair at this moment
        files = save_registration(result, folder, exports)
        answer = request.get("answer", self.output)
        if answer not in list(files):
            shutil.rmtree(folder)
            raise HTTPException(400, f"the answer is one of {', '.join(files)}, got {answer!r}.")
        report = json.loads(files["report"].read_text())
        report["files"] = {what: str(path) for what, path in files.items()}
        report["label_names"] = self._label_names(request["moving"])
        handle, copy = tempfile.mkstemp(suffix=files[answer].name)
        os.close(handle)
        shutil.copyfile(files[answer], copy)
        return copy, report

    def _sources(self, request: dict[str, Any]) -> dict[str, str]:
        """Return the files of a pair, images and final labels."""
        sources = {}
        for role in ("moving", "fixed"):
            image = request.get(role, "")
            sources[role] = self.datastore.get_image_uri(image) if isinstance(image, str) else ""
            if not sources[role]:
                raise ValueError(f"the datastore has no image {image!r}: choose the {role} image by its id.")
            label = self.datastore.get_label_uri(image, DefaultLabelTag.FINAL)
            if label:
                sources[f"{role}_label"] = label
        if self.output == "moved_label" and "moving_label" not in sources:
            raise ValueError(f"the moving image '{request['moving']}' has no final label that could be brought over.")
        return sources

    def _exports(self, request: dict[str, Any]) -> list[str]:
        """Return what to write besides the usual."""
        exports = request.get("exports", [])
        if not isinstance(exports, list) or not all(isinstance(export, str) for export in exports):
            raise ValueError(f"exports are a list of any of {', '.join(EXPORTS)}, got {exports!r}.")
        check_results(self.folder, exports)
        return exports

    def _label_names(self, image: str) -> dict[str, int]:
        """Return the names of an image's segments, as 3D Slicer saved them, and their values."""
        segments = self.datastore.get_label_info(image, DefaultLabelTag.FINAL).get("label_info")
        known = [segment for segment in segments if isinstance(segment, dict)] if isinstance(segments, list) else []
        return {str(segment["name"]): segment["idx"] for segment in known if {"name", "idx"} <= segment.keys()}


class EquiregApp(MONAILabelApp):
    """Offer registration and propagation of labels.

    Args:
        app_dir: folder of this file; results go to `results` in it, or where `--conf results FOLDER` says.
        studies: folder or server of the datastore.
        conf: what `--conf NAME VALUE` gave: `weights` and `results`.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        super().__init__(
            app_dir, studies, conf, name="equireg", description="Deformable registration", version=equireg.__version__
        )

    def init_infers(self) -> dict[str, InferTask]:
        """Return the two tasks."""
        folder = Path(self.conf.get("results", Path(self.app_dir) / "results")).absolute()
        shared = (self.datastore(), folder, self.conf.get("weights", "brain"))
        return {
            "register": RegistrationTask(*shared, "moved", InferType.OTHERS, "Register `moving` to the image"),
            "propagate": RegistrationTask(
                *shared, "moved_label", InferType.SEGMENTATION, "Bring the final label of `moving` to the image"
            ),
        }

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Answer a request; the image that it names is the fixed one."""
        models = list(self._infers)
        if request.get("model") not in models:
            raise HTTPException(400, f"the model is one of {', '.join(models)}, got {request.get('model')!r}.")
        return super().infer({**request, "fixed": request["image"]}, datastore)
