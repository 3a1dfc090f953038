"""MONAI Deploy application: two images in, the moved image, both displacement fields and a report out.

python bundle/docs/hosts/deploy/app.py -i in -o out -m bundle/models/model.ts
"""

from __future__ import annotations

from pathlib import Path

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application
from operators import PairLoaderOperator, RegistrationOperator, RegistrationWriterOperator


class RegistrationApp(Application):
    """Load a pair, register it, write the result; `app.yaml` beside this file says how."""

    def compose(self) -> None:
        """Connect the operators."""
        context = Application.init_app_context(self.argv)
        once = CountCondition(self, 1)  # without it the loader would start over for ever
        loader = PairLoaderOperator(self, once, input_folder=context.input_path, name="loader")
        options = self.kwargs("registration")
        registration = RegistrationOperator(self, app_context=context, options=options, name="registration")
        writer = RegistrationWriterOperator(self, output_folder=context.output_path, name="writer")
        self.add_flow(loader, registration, {("moving", "moving"), ("fixed", "fixed")})
        self.add_flow(registration, writer, {("registration", "registration")})


if __name__ == "__main__":
    app = RegistrationApp()
    app.config(str(Path(__file__).with_name("app.yaml")))
    app.run()
