#!/usr/bin/env bash
# Serve this bundle, or the app beside this script, by MONAI Label on loopback:
#   bash bundle/docs/hosts/label.sh monaibundle|label_app STUDIES [PORT] [WORK] [OPTION...]
# STUDIES is a folder of images, WORK (output/label) gets the app and what it writes, options go to MONAI Label. Run it in
# the environment that `make label` builds: the command `monailabel` starts whatever `python` the PATH has.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name="$1" studies="$2" port="${3:-8000}" work="${4:-output/label}"
app="$work/$name"

if [ "$name" = monaibundle ]; then
    [ -d "$app" ] || monailabel apps --download --name monaibundle --output "$work"
    if [ ! -d "$app/model/equireg" ]; then
        mkdir -p "$app/model/equireg"
        cp -r "$here"/../../{configs,models,scripts,LICENSE} "$app/model/equireg"
    fi
else
    mkdir -p "$work" && cp -r "$here/$name" "$work"
fi
# `ngc` takes the bundle in the app's folder as it is; the default would look for it on the internet.
exec monailabel start_server --app "$app" --studies "$studies" --host 127.0.0.1 --port "$port" \
    --conf models equireg --conf zoo_source ngc --conf sam2 false "${@:5}"
