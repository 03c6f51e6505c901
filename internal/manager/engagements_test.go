package manager

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/types"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/control"
)

func TestEngagements(t *testing.T) {
	e := newEngagements()
	var told []string
	e.onChange(func(g engagement) {
		if _, ok := e.get("deadlock?"); ok { // called without a lock held
			t.Error("unexpected engagement")
		}
		told = append(told, g.Workload.Name)
	})
	web, db := workloadKey{"shop", "Deployment", "web"}, workloadKey{"data", "Deployment", "db"}
	a := engagement{UID: "a", Session: "s", Workload: web, Ports: tcp(80), Rules: whole}
	b := engagement{UID: "b", Session: "s", Workload: web, Ports: tcp(81, 82), Rules: whole}
	b.Mode = v1alpha1.ModeWiretap
	e.set(b)
	e.set(a)
	e.set(a) // the same again changes nothing
	e.set(engagement{UID: "c", Workload: db, Ports: tcp(5432)})
	if d := cmp.Diff([]string{"web", "web", "db"}, told); d != "" {
		t.Errorf("told:\n%s", d)
	}
	if d := cmp.Diff([]engagement{a, b}, e.of(web)); d != "" {
		t.Errorf("of web:\n%s", d)
	}
	want := control.Table{Generation: 3, Items: []control.TableEntry{{Intercept: "a", Protocol: "TCP", ContainerPort: 80}, {Intercept: "b", Protocol: "TCP", ContainerPort: 81, Wiretap: true}, {Intercept: "b", Protocol: "TCP", ContainerPort: 82, Wiretap: true}}}
	got, in := e.table(web)
	if d := cmp.Diff(want, got) + cmp.Diff(map[types.UID]engagement{"a": a, "b": b}, in); d != "" {
		t.Errorf("table:\n%s", d)
	}
	if got, _ := e.table(workloadKey{}); got.Items == nil || len(got.Items) != 0 {
		t.Errorf("an unknown workload's table is %v, want empty and not null", got.Items)
	}
	if !e.inNamespace("data") || e.inNamespace("other") {
		t.Error("inNamespace")
	}
	if g, ok := e.remove("c"); !ok || g.Workload != db || e.inNamespace("data") {
		t.Error("remove")
	}
	told = nil
	if _, ok := e.remove("c"); ok || told != nil {
		t.Error("removing what is not there told somebody")
	}
}

// A preview is one user's, whoever comes at the same time.
func TestEngagementsPreview(t *testing.T) {
	e := newEngagements()
	of := func(uid types.UID, user string) engagement {
		return engagement{UID: uid, User: user, Workload: workloadKey{"shop", "Deployment", string(uid)}, Preview: previewOf("p")}
	}
	if !e.set(of("a", "ada")) || !e.set(of("b", "ada")) {
		t.Error("one's own preview is refused")
	}
	if e.set(of("c", "eve")) || len(e.where(func(g engagement) bool { return g.User == "eve" })) != 0 {
		t.Error("somebody else's preview is taken")
	}
	e.remove("a")
	e.remove("b")
	if !e.set(of("c", "eve")) || len(e.of(workloadKey{"shop", "Deployment", "c"})) != 1 {
		t.Error("a preview that is nobody's any more is refused")
	}
}
