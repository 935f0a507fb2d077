#!/bin/sh
# Bundles the parts of Apache ECharts that the page of a run draws with, with their licences: `make charts`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
assets=$here/../../src/fedloom/report/page/assets
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here/package.json" "$here/entry.js" "$work"
cd "$work"
npm install --no-audit --no-fund --silent
node node_modules/esbuild/install.js  # where npm does not run the scripts of packages
npx esbuild entry.js --bundle --minify --format=iife --global-name=echarts --legal-comments=none --target=es2020 \
    --define:process.env.NODE_ENV='"production"' --outfile=bundle.js --log-level=warning
cat "$here/notice.txt" bundle.js > "$assets/echarts.min.js"
modules=node_modules
{
    cat $modules/echarts/NOTICE; printf '\n\n==== Apache ECharts ====\n\n'; cat $modules/echarts/LICENSE
    printf '\n==== d3, parts of which are in Apache ECharts ====\n\n'; cat $modules/echarts/licenses/LICENSE-d3
    printf '\n==== zrender ====\n\n'; cat $modules/zrender/LICENSE
    printf '\n\n==== tslib ====\n\n'; cat $modules/tslib/LICENSE.txt
} > "$assets/echarts.LICENSE.txt"
