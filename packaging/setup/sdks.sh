#!/bin/sh
# Installs Microsoft's Azure IoT SDKs, which hubsim is tested with, into build/sdks/: a Python
# environment in python/, Node packages in node/. The versions are pinned in hubsim/tests/sdk/.
# Does nothing when the pinned versions are installed already. Needs the Debian packages python3,
# python3-venv, nodejs and npm, or the same programs from elsewhere on PATH.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
pins=$root/hubsim/tests/sdk
sdks=$root/build/sdks

fail() {
    echo "sdks.sh: $1" >&2
    exit 1
}

for program in python3 node npm; do
    command -v "$program" >/dev/null ||
        fail "no $program; install it: apt-get install python3 python3-venv nodejs npm"
done
python3 -c 'import venv, ensurepip' 2>/dev/null ||
    fail "python3 has no venv module; install it: apt-get install python3-venv"

# What the installation is made of: another pin, Python or Node means to install anew.
wanted=$({
    cat "$0" "$pins/requirements.txt" "$pins/package.json" "$pins/package-lock.json"
    python3 --version
    node --version
    echo "$sdks"
} | sha256sum)
if [ "$(cat "$sdks/installed" 2>/dev/null || true)" = "$wanted" ]; then
    exit 0
fi

mkdir -p "$sdks"
rm -rf "$sdks/installed" "$sdks/python" "$sdks/node"

echo "sdks.sh: installing the Python SDK into $sdks/python"
python3 -m venv "$sdks/python"
"$sdks/python/bin/pip" install --quiet --disable-pip-version-check \
    --requirement "$pins/requirements.txt" ||
    fail "pip could not install the Python SDK; its message is above"

echo "sdks.sh: installing the Node SDKs into $sdks/node"
mkdir "$sdks/node"
cp "$pins/package.json" "$pins/package-lock.json" "$sdks/node/"
npm ci --prefix "$sdks/node" --ignore-scripts --no-audit --no-fund --loglevel=error ||
    fail "npm could not install the Node SDKs; its message is above"

echo "$wanted" >"$sdks/installed"
