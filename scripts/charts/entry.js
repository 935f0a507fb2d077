// The parts of Apache ECharts that the page of a run draws with, as one script: `make charts` writes it.
export { init, version } from "echarts/core";
import { use } from "echarts/core";
import { BarChart, CustomChart, LineChart, ScatterChart } from "echarts/charts";
import { DataZoomInsideComponent, GraphicComponent, GridComponent, TooltipComponent } from "echarts/components";
import { LabelLayout } from "echarts/features";
import { SVGRenderer } from "echarts/renderers";

use([
  BarChart, CustomChart, LineChart, ScatterChart,
  DataZoomInsideComponent, GraphicComponent, GridComponent, TooltipComponent, LabelLayout, SVGRenderer,
]);
