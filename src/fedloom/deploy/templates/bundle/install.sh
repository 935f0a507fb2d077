#!/bin/sh
# Sets up site %{site} on a machine without a network: checks this bundle, installs fedloom, and runs the doctor.
#
#   ./install.sh [FOLDER]    FOLDER: where the site is to live; otherwise %{folder}
#   PYTHON=/path/to/python3  the Python to use, where it is not found
#
# Run it again whenever you like: what is done is not done again, and no file of the site is written over.
# Ends with 0 where all is well, 1 where the doctor finds something to do, 2 where nothing could be set up.
set -eu
umask 022
unset PYTHONPATH PYTHONHOME
site="%{site}"
targets="%{targets}"
needs_kib=%{kib}
model_kib=%{model_kib}

stop() {
    echo "error: $*" >&2
    exit 2
}

target="${1:-%{folder}}"
cd "$(dirname "$0")"
here="$PWD"
case "$target" in /*) ;; *) target="${OLDPWD:-$here}/$target" ;; esac
case "$target" in
    *[!A-Za-z0-9._/~+@-]*) stop "$target: systemd units need a path of letters, digits and . _ / ~ + @ -" ;;
esac

echo "1. Is the bundle whole?"
if command -v sha256sum > /dev/null; then sums="sha256sum"; else sums="shasum -a 256"; fi
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
trap 'exit 2' HUP INT TERM
[ -f SHA256SUMS ] || stop "SHA256SUMS is missing: carry the whole bundle here"
LC_ALL=C $sums -c SHA256SUMS > "$work/sums" 2>&1 || {
    grep -v ': OK$' "$work/sums" >&2 || :
    stop "the files above are missing or were changed: carry the bundle here again"
}
# A wheel that was slipped in would be installed as well.
find wheelhouse site model ! -type d 2> /dev/null | LC_ALL=C sort > "$work/found" || :
sed 's/^[0-9a-f]*  //' SHA256SUMS | LC_ALL=C sort > "$work/listed"
if LC_ALL=C comm -23 "$work/found" "$work/listed" | grep . >&2; then
    stop "the files above are not of this bundle: carry it here again"
fi
digest="$($sums SHA256SUMS | cut -d ' ' -f 1)"
echo "   yes. SHA-256 of SHA256SUMS: $digest"
echo "   (is it the one that the federation's operator told you? whoever can change files can change their list too)"

echo "2. Does this machine fit?"
cat > "$work/fits.py" <<'END'
import platform, sys

own = (platform.system(), platform.machine(), "3." + str(sys.version_info[1]))
library = platform.mac_ver()[0] if own[0] == "Darwin" else platform.libc_ver()[1]
release = [int(part) for part in (library.split(".") + ["0", "0"])[:2] if part.isdigit()]
if sys.version_info[0] == 3:
    for line in sys.argv[1].split(";"):
        system, machine, major, minor, python = line.split()
        if (system, machine, python) == own and release >= [int(major), int(minor)]:
            sys.exit(0)
print("%%s is Python %%s on %%s %%s, %%s" %% (sys.executable, platform.python_version(), own[0], own[1], library))
sys.exit(1)
END
python=
for candidate in ${PYTHON:-python3 %{pythons}}; do
    command -v "$candidate" > /dev/null || continue
    if "$candidate" -I "$work/fits.py" "$targets" >> "$work/unfit" 2>&1; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    [ ! -s "$work/unfit" ] || sort -u "$work/unfit" >&2
    stop "no Python here that this bundle is for: it needs %{words}. Name one with PYTHON=/path/to/python3, or ask" \
        "the operator for a bundle for this machine (federation bundle --platform, --python)"
fi
"$python" -I -c "import ensurepip, venv" 2> /dev/null || stop "$python lacks the modules venv and ensurepip:" \
    "install them from the system's own medium (python3-venv on Debian and Ubuntu)"
echo "   yes: $("$python" --version)"

venv="$target/%{venv}"
mark="$venv/%{mark}"
if [ -d "$venv" ] && [ ! -f "$mark" ]; then
    stop "$venv is there and is not of this script: move it away, or name another folder"
fi
mkdir -p "$target" || stop "$target cannot be made: run this as a user who may, or name another folder"
[ ! -d model ] || [ -d "$target/model" ] || needs_kib=$((needs_kib + model_kib))
if [ ! -f "$mark" ] || [ "$(cat "$mark")" != "$digest" ]; then
    free="$(df -Pk "$target" | awk 'NR == 2 { print $4 }')"
    [ "$free" -ge "$needs_kib" ] || stop "$target has $((free / 1024)) MiB of room, $((needs_kib / 1024)) are needed:" \
        "make room, or name another folder"
    echo "3. Installing fedloom %{version} in $venv"
    mkdir -p "$venv"
    echo begun > "$mark"
    # What an earlier bundle left there goes, the mark does not: a try that is cut short is known as ours.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name %{mark} -exec rm -rf {} +
    "$python" -m venv "$venv" || stop "$venv could not be made; the reason stands above"
    PIP_CONFIG_FILE=/dev/null "$venv/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-input \
        --no-cache-dir --no-index --find-links wheelhouse --only-binary :all: "fedloom[%{extras}]==%{version}" ||
        stop "pip could not install from the wheelhouse; the reason stands above"
    echo "$digest" > "$mark"
else
    echo "3. fedloom %{version} is installed in $venv already"
fi

echo "4. The site's files in $target"
kept=
for file in site/* site/.gitignore; do
    [ -f "$file" ] || continue
    name="$(basename "$file")"
    # A key is for its owner alone from its first byte on, whatever became of modes on the way here.
    case "$name" in node.key) mask=077 ;; *) mask=022 ;; esac
    (umask "$mask" && sed -e 's|%{made_bin}|'"$venv/bin"'|g' -e 's|%{made_folder}|'"$target"'|g' "$file" > "$work/$name")
    if [ ! -e "$target/$name" ]; then
        (umask "$mask" && cp "$work/$name" "$target/.$name.new")
        case "$name" in *.sh) chmod 755 "$target/.$name.new" ;; esac
        mv "$target/.$name.new" "$target/$name"
    elif ! cmp -s "$work/$name" "$target/$name"; then
        kept="$kept $name"
    fi
done
[ -z "$kept" ] || echo "   these differ from the bundle's and were left as they are:$kept (compare them with $here/site)"
[ -e "$target/node.key" ] || echo "   node.key is not in this bundle: put the site's own private key there (chmod 600)"
if [ -d model ] && [ ! -d "$target/model" ]; then
    rm -rf "$target/.model.new"
    cp -R model "$target/.model.new"
    mv "$target/.model.new" "$target/model"
fi

echo "5. The doctor, with nothing but files"
code=0
NO_COLOR=1 "$venv/bin/fedloom" federation doctor "$target" --offline || code=$?
echo "Next:"
if [ "$code" -ne 0 ]; then
    echo "- mend what the doctor calls fail: model and data are paths in $target/SITE.toml"
    echo "- then run this script again, or: $venv/bin/fedloom federation doctor $target --offline"
fi
cat <<END
- say in $target/SITE.toml what this site allows ([policy])
- have the worker and the node started: the units in $target say how, and which users they need
- once there is a way to %{address}: $venv/bin/fedloom federation doctor $target
END
[ "$code" -eq 0 ] || exit 1
