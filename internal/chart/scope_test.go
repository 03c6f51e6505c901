package chart

import (
	"errors"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// TestDeclared: a manager that Argo CD or kubectl has made of what helm template gives, without a release, is known all the same.
func TestDeclared(t *testing.T) {
	for name, row := range map[string]struct {
		theirs, ours []string // values
		want         string
	}{
		"both for the whole cluster":      {want: "already installed in namespace platform"},
		"theirs for the whole cluster":    {ours: []string{"namespaces={shop}"}, want: "namespace platform is for the whole cluster"},
		"ours for the whole cluster":      {theirs: []string{"namespaces={shop,dev}"}, want: "namespace platform is for dev, shop already"},
		"one namespace on both lists":     {theirs: []string{"namespaces={shop,dev}"}, ours: []string{"namespaces={shop,prod}"}, want: "namespace platform is for shop already"},
		"lists without a common element ": {theirs: []string{"namespaces={dev}"}, ours: []string{"namespaces={shop}"}},
	} {
		t.Run(name, func(t *testing.T) {
			var cluster []runtime.Object
			for _, o := range objects(t, Options{Namespace: "platform", Set: row.theirs}) {
				cluster = append(cluster, o.(runtime.Object))
			}
			o := Options{Set: row.ours}
			vals, err := o.values()
			if err != nil {
				t.Fatal(err)
			}
			core := fake.NewClientset(cluster...)
			c := &client{core: core, namespace: "doppel"}
			err = c.refuseOverlap(t.Context(), opInstall, scopeOf(vals))
			if row.want == "" && err != nil || row.want != "" && (err == nil || uerr.From(err).Kind != uerr.Conflict || !strings.Contains(err.Error(), row.want)) {
				t.Errorf("%v, want %q", err, row.want)
			}
			if err := c.refuseForeign(t.Context(), opInstall); err != nil {
				t.Errorf("our namespace: %v", err)
			}

			c.namespace = "platform" // what is declared there is not ours to install again, to upgrade or to remove
			if err := c.refuseOverlap(t.Context(), opInstall, scopeOf(vals)); err != nil {
				t.Errorf("it is in its own way: %v", err)
			}
			if err := c.refuseForeign(t.Context(), opInstall); !errors.Is(err, ErrInstalled) {
				t.Errorf("%v, want ErrInstalled", err)
			}
			if hint := uerr.From(notInstalled(c.namespace)).Hint; hint != "doppel helm install --manager-namespace platform" {
				t.Errorf("the hint is for another one: %s", hint)
			}
			if err := c.absent(t.Context(), opUninstall); errors.Is(err, ErrNotInstalled) || uerr.From(err).Kind != uerr.Conflict {
				t.Errorf("%v, want a conflict", err)
			}
		})
	}
}
