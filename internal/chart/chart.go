// Package chart owns installing doppel in a cluster: the embedded Helm chart, its values, and the release made of it.
package chart

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"regexp"
	"sort"
	"strings"
	"time"

	"helm.sh/helm/v4/pkg/chart/common"
	chartcommon "helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/loader/archive"
	chartv2 "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"helm.sh/helm/v4/pkg/strvals"

	doppel "github.com/doppel-dev/doppel/charts/doppel"
	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/helm"
	"github.com/doppel-dev/doppel/internal/uerr"
)

const (
	// ReleaseName is the name of the Helm release, and of the manager's Deployment, Service, ServiceAccount and ConfigMap.
	ReleaseName = "traffic-manager"
	// DefaultNamespace is where the manager goes when nobody says otherwise.
	DefaultNamespace = helm.DefaultNamespace
	// DefaultTimeout bounds an install or upgrade, waiting included.
	DefaultTimeout = helm.DefaultTimeout
)

// valuesHint says where the values are described.
const valuesHint = "they are described in https://github.com/doppel-dev/doppel/blob/main/charts/doppel/values.yaml"

// Options says what to install and how. The zero value installs the defaults into DefaultNamespace, which must exist, and returns
// as soon as the objects are applied.
type Options struct {
	// Namespace is the manager's namespace; empty means DefaultNamespace.
	Namespace string
	// Values, ValueFiles (paths of YAML files) and Set ("a.b=c", as Helm's --set) override the chart's defaults; later ones win
	// in this order.
	Values     map[string]any
	ValueFiles []string
	Set        []string
	// SetString is Set of values that are text whatever they look like (--set-string).
	SetString []string
	// CreateNamespace creates the namespace if it is missing. Uninstall removes a namespace that was created this way.
	CreateNamespace bool
	// Wait waits until the manager is ready, or says why it does not become so.
	Wait bool
	// Timeout bounds the whole operation; 0 means DefaultTimeout.
	Timeout time.Duration
	// ResetValues makes Upgrade forget the overrides of earlier installs and upgrades.
	ResetValues bool
	// Log gets what Helm has to say; nil means nobody.
	Log *slog.Logger
	// Progress gets one line for each step; nil means none is told.
	Progress func(string)
}

// withDefaults fills in what the zero value means.
func (o Options) withDefaults() Options {
	if o.Namespace == "" {
		o.Namespace = DefaultNamespace
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	return o
}

// values merges the overrides; a mistake in them is a usage error.
func (o Options) values() (map[string]any, error) {
	vals := map[string]any{}
	if o.Values != nil {
		vals = loader.MergeMaps(vals, o.Values)
	}
	for _, name := range o.ValueFiles {
		f, err := os.Open(name)
		if err != nil {
			return nil, uerr.Wrap(err, uerr.Usage, "", "read the values")
		}
		m, err := loader.LoadValues(f)
		_ = f.Close()
		if err != nil {
			return nil, uerr.Wrap(err, uerr.Usage, "", "values file %s", name)
		}
		vals = loader.MergeMaps(vals, m)
	}
	for _, f := range []struct {
		name  string
		given []string
		parse func(string, map[string]any) error
	}{{"set", o.Set, strvals.ParseInto}, {"set-string", o.SetString, strvals.ParseIntoString}} {
		for _, s := range f.given {
			if err := f.parse(s, vals); err != nil {
				return nil, uerr.Wrap(err, uerr.Usage, "write it as key=value, for example image.tag=1.2.3", "--%s %s", f.name, s)
			}
		}
	}
	return vals, nil
}

// Load returns the embedded chart, with the version of this program.
func Load() (*chartv2.Chart, error) {
	var files []*archive.BufferedFile
	err := fs.WalkDir(doppel.Files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := doppel.Files.ReadFile(name)
		if err != nil {
			return err
		}
		files = append(files, &archive.BufferedFile{Name: name, Data: data})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the embedded chart: %w", err)
	}
	ch, err := loader.LoadFiles(files)
	if err != nil {
		return nil, fmt.Errorf("load the embedded chart: %w", err)
	}
	v := strings.TrimPrefix(buildinfo.Version, "v")
	ch.Metadata.Version, ch.Metadata.AppVersion = v, v
	if err := ch.Validate(); err != nil {
		return nil, fmt.Errorf("the embedded chart: %w", err)
	}
	return ch, nil
}

// Render returns the chart's manifests, one per template file, without a cluster. The keys are paths below templates/.
func Render(o Options) (map[string]string, error) {
	o = o.withDefaults()
	vals, err := o.values()
	if err != nil {
		return nil, err
	}
	ch, err := Load()
	if err != nil {
		return nil, err
	}
	return render(ch, vals, o.Namespace)
}

func render(ch *chartv2.Chart, vals map[string]any, namespace string) (map[string]string, error) {
	full, err := chartcommon.ToRenderValues(ch, vals, common.ReleaseOptions{
		Name: ReleaseName, Namespace: namespace, Revision: 1, IsInstall: true,
	}, common.DefaultCapabilities)
	if err != nil {
		return nil, valuesError(err)
	}
	out, err := engine.Render(ch, full)
	if m := refusedRE.FindStringSubmatch(fmt.Sprint(err)); m != nil {
		return nil, uerr.New(uerr.Usage, valuesHint, "the chart does not take these values: %s", m[1])
	}
	if err != nil {
		return nil, fmt.Errorf("render the chart: %w", err)
	}
	files := make(map[string]string, len(out))
	for name, text := range out {
		if strings.HasPrefix(path.Base(name), "_") || strings.TrimSpace(text) == "" {
			continue
		}
		files[strings.TrimPrefix(name, ch.Name()+"/templates/")] = text
	}
	return files, nil
}

// refusedRE finds the words of template doppel.check.
var refusedRE = regexp.MustCompile(`execution error at \([^)]*\): (.*)`)

// Manifest returns all that Render gives, but for the notes, as one YAML stream in the order of the file names.
func Manifest(o Options) (string, error) {
	files, err := Render(o)
	if err != nil {
		return "", err
	}
	names := make([]string, 0, len(files))
	for name := range files {
		if name != "NOTES.txt" {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	var b strings.Builder
	for _, name := range names {
		b.WriteString("---\n# " + name + "\n" + strings.TrimPrefix(strings.TrimSpace(files[name]), "---\n") + "\n")
	}
	return b.String(), nil
}

// valuesError makes a violation of values.schema.json a usage error.
func valuesError(err error) error {
	var bad common.ErrNoValue
	if errors.As(err, &bad) || strings.Contains(err.Error(), "don't meet the specifications of the schema") {
		return uerr.New(uerr.Usage, valuesHint, "the chart does not take these values: %s", schemaReasons(err))
	}
	return err
}

// schemaReasons shortens Helm's report of a schema violation to one line.
func schemaReasons(err error) string {
	var reasons []string
	for line := range strings.Lines(err.Error()) {
		if r, ok := strings.CutPrefix(strings.TrimSpace(line), "- "); ok {
			reasons = append(reasons, r)
		}
	}
	if len(reasons) == 0 {
		return err.Error()
	}
	return strings.Join(reasons, "; ")
}
