//! Pictures of results, as SVG.

use anyhow::anyhow;
use plotters::prelude::*;

/// Bars that stand beside each other because they are compared.
#[derive(Debug, Clone)]
pub struct Group {
    /// What they have in common.
    pub label: String,
    /// The bars.
    pub bars: Vec<Bar>,
}

/// One bar.
#[derive(Debug, Clone)]
pub struct Bar {
    /// Which of the series.
    pub series: String,
    /// Its height; `None`: nothing came of it.
    pub value: Option<f64>,
}

const COLOURS: [RGBColor; 8] = [
    RGBColor(0x4c, 0x72, 0xb0),
    RGBColor(0xdd, 0x84, 0x52),
    RGBColor(0x81, 0x72, 0xb3),
    RGBColor(0xc4, 0x4e, 0x52),
    RGBColor(0x93, 0x78, 0x60),
    RGBColor(0x8c, 0x8c, 0x8c),
    RGBColor(0x64, 0xb5, 0xcd),
    RGBColor(0x2c, 0xa0, 0x5a),
];

/// Draws grouped bars on a logarithmic scale, with a line at the target, and returns the SVG.
pub fn bars(title: &str, unit: &str, target: Option<f64>, groups: &[Group]) -> anyhow::Result<String> {
    let mut series: Vec<&str> = Vec::new();
    for bar in groups.iter().flat_map(|g| &g.bars) {
        if !series.contains(&bar.series.as_str()) {
            series.push(&bar.series);
        }
    }
    let values = || groups.iter().flat_map(|g| &g.bars).filter_map(|b| b.value).filter(|v| *v > 0.0);
    let top = values().fold(target.unwrap_or(1.0), f64::max) * 2.0;
    let bottom = values().fold(target.unwrap_or(1.0), f64::min).min(1.0) * 0.7;
    let width = 130 + groups.len() as u32 * (24 * series.len() as u32 + 30);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width.max(760), 460)).into_drawing_area();
        let broken = |e: &dyn std::fmt::Display| anyhow!("the picture cannot be drawn: {e}");
        root.fill(&WHITE).map_err(|e| broken(&e))?;
        let per_group = series.len() as f64 + 1.0;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..groups.len() as f64 * per_group, (bottom..top).log_scale())
            .map_err(|e| broken(&e))?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .y_desc(unit)
            .y_label_formatter(&|v| if *v >= 10.0 { format!("{v:.0}") } else { format!("{v:.1}") })
            .draw()
            .map_err(|e| broken(&e))?;
        for (n, name) in series.iter().enumerate() {
            let colour = COLOURS[n % COLOURS.len()];
            let rectangles = groups.iter().enumerate().filter_map(|(g, group)| {
                let value = group.bars.iter().find(|b| b.series == **name)?.value?;
                let left = g as f64 * per_group + n as f64 + 0.5;
                Some(Rectangle::new([(left, bottom), (left + 0.9, value.max(bottom))], colour.filled()))
            });
            chart
                .draw_series(rectangles)
                .map_err(|e| broken(&e))?
                .label(*name)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        }
        if let Some(target) = target {
            let line = [(0.0, target), (groups.len() as f64 * per_group, target)];
            chart.draw_series([PathElement::new(line, BLACK.stroke_width(1))]).map_err(|e| broken(&e))?;
        }
        let labels = groups.iter().enumerate().map(|(g, group)| {
            let middle = g as f64 * per_group + per_group / 2.0;
            let style = TextStyle::from(("sans-serif", 12)).pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Center,
                plotters::style::text_anchor::VPos::Top,
            ));
            Text::new(group.label.clone(), (middle, bottom * 0.97), style)
        });
        chart.plotting_area().strip_coord_spec();
        let area = chart.plotting_area();
        for label in labels {
            area.draw(&label).map_err(|e| broken(&e))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .draw()
            .map_err(|e| broken(&e))?;
        root.present().map_err(|e| broken(&e))?;
    }
    Ok(svg)
}
