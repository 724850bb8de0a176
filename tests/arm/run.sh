#!/usr/bin/env bash
# The tests of the C library and its Python extensions on AArch64, without such a machine: `make test-arm`.
#
# A Debian root for arm64 holds Python; qemu runs it.  The extensions are built by the project's own setup.py inside it,
# with a cross compiler that runs natively, so that sources and flags are written down once.
#
#   ARM_CACHE  folder of the root, the packages and the build; .arm in the project's root unless told
#   ARM_SUITE  Debian release of the root
#   PYTHON     an interpreter of this machine with pip
#   arguments  for pytest, instead of the tests below
set -euo pipefail
cd "$(dirname "$0")/../.."
source_root=$PWD

fail() {
    echo "test-arm: $1" >&2
    exit 1
}

# 77: nothing was tested because this machine cannot be set up for it; not a failure of what is tested.
cannot() {
    echo "test-arm: not run: $1" >&2
    exit 77
}

suite=${ARM_SUITE:-bookworm}
python=${PYTHON:-python3}
cache=${ARM_CACHE:-.arm}
case $cache in *[[:space:]]*) fail "ARM_CACHE: expected a path without spaces, got '$cache'; choose another" ;; esac
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
root=$cache/root site=$cache/site build=$cache/build

exec 9>"$cache/lock"
flock -n 9 || fail "another run uses $cache; wait for it or set ARM_CACHE"

# 1. The tools of this machine.
declare -A package_of=(
    [aarch64-linux-gnu-gcc]=gcc-aarch64-linux-gnu [aarch64-linux-gnu-g++]=g++-aarch64-linux-gnu
    [qemu-aarch64]=qemu-user [mmdebstrap]=mmdebstrap [make]=make
)
missing=()
for tool in "${!package_of[@]}"; do
    command -v "$tool" >/dev/null || missing+=("${package_of[$tool]}")
done
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing+=(debian-archive-keyring)
if [ ${#missing[@]} -gt 0 ]; then
    as_root=()
    command -v apt-get >/dev/null || cannot "needs ${missing[*]}; install them with this system's package manager"
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || cannot "needs ${missing[*]}; run: sudo apt-get install ${missing[*]}"
        as_root=(sudo -n)
    fi
    "${as_root[@]}" apt-get update -q >"$cache/apt.log" 2>&1 &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -q --no-install-recommends libc6-dev-arm64-cross "${missing[@]}" >>"$cache/apt.log" 2>&1 ||
        cannot "apt-get could not install ${missing[*]}; see $cache/apt.log"
fi
"$python" -m pip --version >/dev/null 2>&1 || cannot "needs pip for $python; install python3-pip or set PYTHON"

# 2. The root: extracted, never configured, hence no emulation; a tar, hence no trace of the mode mmdebstrap chose.
include=python3,libpython3-dev,libasan8,libubsan1,libgomp1,libstdc++6,zlib1g
if [ "$(cat "$root/made" 2>/dev/null)" != "$suite $include" ]; then
    rm -rf "$root" "$site"
    mkdir -p "$root"
    mmdebstrap --quiet --variant=extract --arch=arm64 --include="$include" --format=tar "$suite" \
        "$cache/root.tar" 2>"$cache/root.log" || cannot "mmdebstrap could not make the root; see $cache/root.log"
    tar -x -C "$root" --exclude='./dev/*' --no-same-owner -f "$cache/root.tar"
    rm "$cache/root.tar"
    echo "$suite $include" >"$root/made"
fi
interpreter=$(readlink -f "$root/usr/bin/python3")
version=${interpreter##*/python}

# 3. Packages for that Python; `site` is complete or absent.
packages=(numpy safetensors pytest pytest-xdist hypothesis onnx pillow cython setuptools)
if [ "$(cat "$site/made" 2>/dev/null)" != "$version ${packages[*]}" ]; then
    rm -rf "$site"
    "$python" -m pip --disable-pip-version-check install --quiet --target "$site" --only-binary=:all: \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --implementation cp --python-version "$version" "${packages[@]}" >"$cache/pip.log" 2>&1 ||
        cannot "pip could not get the packages for Python $version on AArch64; see $cache/pip.log"
    echo "$version ${packages[*]}" >"$site/made"
fi

# 4. Commands that hide the emulation from setup.py and from the tests, which start Python, gcc and what gcc made.
bin=$cache/bin
rm -rf "$bin"
mkdir "$bin"
cat >"$bin/python3" <<SCRIPT
#!/bin/sh
exec qemu-aarch64 -L $root -0 $bin/python3 $interpreter "\$@"
SCRIPT
cat >"$bin/compiler" <<SCRIPT
#!/bin/sh
# The cross compiler against the root; a program it links becomes a script that runs it.
output=a.out previous=
for argument; do
    [ "\$previous" != -o ] || output=\$argument
    previous=\$argument
done
name=\${0##*/}
$(dirname "$(command -v aarch64-linux-gnu-gcc)")/aarch64-linux-gnu-"\${name#aarch64-linux-gnu-}" --sysroot=$root \\
    -isystem $root/usr/include/aarch64-linux-gnu -isystem $root/usr/include -B $root/usr/lib/aarch64-linux-gnu "\$@" || exit
if [ -f "\$output" ] && aarch64-linux-gnu-readelf -l "\$output" 2>/dev/null | grep -q INTERP; then
    mv "\$output" "\$output.aarch64"
    printf '#!/bin/sh\nexec qemu-aarch64 -L $root "\$0.aarch64" "\$@"\n' >"\$output"
    chmod +x "\$output"
fi
SCRIPT
chmod +x "$bin/python3" "$bin/compiler"
for name in gcc g++; do
    ln -s compiler "$bin/$name"
    ln -s compiler "$bin/aarch64-linux-gnu-$name"
done
for name in ar nm; do
    ln -s "$(command -v "aarch64-linux-gnu-$name")" "$bin/$name"
done
export PATH=$bin:$PATH
# Cortex-A76: no SVE, as on the devices this is for.  Nothing of this machine's Python may reach the other.
unset PYTHONSTARTUP PYTHONWARNINGS VIRTUAL_ENV CC CFLAGS LDFLAGS LDSHARED
# PROCESSOR_EMULATED: to the tests, fewer random cases.
export PROCESSOR_EMULATED=1 QEMU_CPU=cortex-a76 PYTHONHOME=$root/usr PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1

# 5. The wheel, by setup.py; from a copy, as another build may be writing into the sources, and unpacked apart, so that
# nothing is imported from them.
rm -rf "$build"
mkdir -p "$build/source"
cp -r setup.py pyproject.toml MANIFEST.in README.md LICENSE inflight_edge calibration csrc "$build/source"
find "$build/source/inflight_edge" \( -name '*.so' -o -name '*.c' \) -delete
cd "$build/source"
PYTHONPATH=$site python3 -W ignore setup.py -q egg_info --egg-base "$build" build --build-base "$build" \
    bdist_wheel --bdist-dir "$build/wheel" --dist-dir "$build/dist" >"$cache/build.log" 2>&1 ||
    fail "the extensions did not build; see $cache/build.log: $(tail -1 "$cache/build.log")"
python3 -m zipfile -e "$build"/dist/*.whl "$build/lib"
export PYTHONPATH=$build/lib:$site

# 6. NEON runs, and it is this build's.
PYTHONPATH=$build/lib:$site python3 - "$build/lib" <<'CHECK' || fail "NEON is not what scores on AArch64"
import platform
import sys

import inflight_edge.scoring as scoring

assert platform.machine() == "aarch64", platform.machine()
assert scoring.__file__.startswith(sys.argv[1]), scoring.__file__
assert scoring.instruction_set() == "neon", scoring.instruction_sets()
print(f"test-arm: {platform.machine()}, Python {platform.python_version()}, {' '.join(scoring.instruction_sets())}")
CHECK

# 7. The tests of NEON.  Left out, as they run natively elsewhere and say nothing about it: engines and what needs ONNX
# Runtime or torch; the other instruction sets, the reference and the CUDA kernels on the processor; the interpreter's lock;
# memory over many frames; the counting of allocations, as the symbols of NEON's object name none.  Slow under emulation:
# guards of hundreds of megabytes and sanitisers.
if [ $# -eq 0 ]; then
    scoring=(judge many_classes scorer scorer_accuracy score_c verdicts)
    set -- "${scoring[@]/#/tests/scoring/test_}"
    set -- "${@/%/.py}" tests/test_preprocess_native.py tests/test_verdict.py -n 2 \
        -k "not reference and not portable and not avx and not cuda and not large_guards and not thousand_classes \
and not sanitisers and not does_not_allocate and not releases_the_interpreter and not memory_does_not_grow"
fi
cd "$source_root"
python3 -m pytest -q -p no:cacheprovider "$@"
