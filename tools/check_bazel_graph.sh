#!/usr/bin/env bash
# Checks BUILD without a network: every file that a test imports is in its target's graph.
#
#   tools/check_bazel_graph.sh [TEST_TARGET...]     (default: //:losses_test)
#
# Works on a temporary copy, with Debian's Bazel 4 and stubs in place of the repositories that
# MODULE.bazel would fetch; the third-party packages are those of the python3 on PATH. So BUILD is
# checked, and MODULE.bazel is not.
set -euo pipefail

command -v bazel >/dev/null || {
    echo "bazel is missing. On Debian or Ubuntu: apt-get install bazel-bootstrap" >&2
    exit 1
}
python3 -c 'import pytest, tensorflow' 2>/dev/null || {
    echo "$(command -v python3) has no pytest or no tensorflow. Run: make bazel" >&2
    exit 1
}

root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
tree=$scratch/tree
stubs=$scratch/stubs

# The stubs are for this version, and Debian's bazel may have several to choose from.
export USE_BAZEL_VERSION=4

# The system's rc file stays: it says where Debian keeps the parts that Bazel unpacks from itself.
in_tree() { (cd "$tree" && bazel --nohome_rc --output_user_root="$scratch/bazel" "$@"); }

clean_up() {
    in_tree shutdown >/dev/null 2>&1 || true
    chmod -R u+w "$scratch"  # Bazel writes its outputs read-only.
    rm -rf "$scratch"
}
trap clean_up EXIT

mkdir "$tree" "$stubs"
# An unquoted * leaves out the hidden .git and .venv.
(cd "$root" && tar --create --anchored --exclude-from=.bazelignore --exclude='bazel-*' -- *) |
    tar --extract --directory "$tree"
touch "$tree/WORKSPACE"

# stub_rules REPOSITORY FILE RULE...: a file to load from that hands on Bazel 4's own rules.
stub_rules() {
    local file=$stubs/$1/$2
    shift 2
    mkdir -p "$(dirname "$file")"
    touch "$(dirname "$file")/BUILD"
    for rule in "$@"; do echo "$rule = native.$rule"; done >"$file"
}
for rule in py_binary py_library py_test; do
    stub_rules rules_python "python/$rule.bzl" "$rule"
done
# One empty target for each locked package, so that BUILD cannot name a package that is not locked.
sed -n 's/^\([a-z0-9._-]*\)==.*/\1/p' "$root/requirements_lock.txt" | tr '.-' '__' | sort -u |
    while read -r package; do
        mkdir -p "$stubs/pypi/$package"
        echo "py_library(name = '$package', visibility = ['//visibility:public'])" \
            >"$stubs/pypi/$package/BUILD"
    done
# Bazel's own BUILD files load these three, whatever is built.
stub_rules rules_cc cc/defs.bzl cc_binary cc_library cc_test cc_toolchain cc_toolchain_suite objc_library
stub_rules rules_java java/defs.bzl java_binary java_import java_runtime java_toolchain
mkdir "$stubs/remote_coverage_tools"
for tool in coverage_report_generator lcov_merger; do
    echo "filegroup(name = '$tool', visibility = ['//visibility:public'])"
done >"$stubs/remote_coverage_tools/BUILD"

# Newer versions of Bazel refuse a glob that matches nothing.
options=(--noshow_progress --incompatible_disallow_empty_glob)
for stub in "$stubs"/*; do
    touch "$stub/WORKSPACE"
    options+=("--override_repository=$(basename "$stub")=$stub")
done

in_tree query "${options[@]}" //...
# Debian's rc file asks for a log of each sandbox, which buries what a failing test says.
options+=(--nosandbox_debug --test_output=errors)
in_tree build "${options[@]}" //...
# Collecting imports what each test file imports, in a tree that holds only what BUILD lists.
in_tree test "${options[@]}" --test_arg=--collect-only //...
in_tree test "${options[@]}" "${@:-//:losses_test}"
