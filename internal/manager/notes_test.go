package manager

import (
	"strings"
	"testing"
	"unicode/utf8"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/tunnel"
)

func matched(name string) *v1alpha1.Intercept {
	in := intercept(name, "ada", "mine")
	in.Spec.HTTP = &v1alpha1.HTTPMatch{Headers: []v1alpha1.HeaderMatch{{Name: "x-user", TextMatch: v1alpha1.TextMatch{Op: "equal", Value: "ada"}}}}
	return in
}

// An intercept by request of a port that speaks TLS needs the secret's name, and is told both ways out.
func TestRefuseTLS(t *testing.T) {
	for name, tt := range map[string]struct {
		annotation string
		in         *v1alpha1.Intercept
		reason     string
		words      []string
	}{
		"no annotation":        {"", matched("in-1"), "TLS", []string{"known by its name https", "doppel.dev/tls: 8080=SECRET", "take the port whole"}},
		"of another port":      {"9090=web-tls", matched("in-1"), "TLS", []string{"speaks TLS"}},
		"a wrong annotation":   {"web-tls", matched("in-1"), "BadTLS", []string{"is not PORT=SECRET"}},
		"annotated":            {"8080=web-tls", matched("in-1"), "", nil},
		"all connections":      {"", intercept("in-1", "ada", "mine"), "", nil},
		"annotated, by others": {"8080=web-tls,9090=x", matched("in-1"), "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReconciler(t, tt.in)
			d := &appsv1.Deployment{ObjectMeta: meta("shop", "web")}
			r.world.get(d)
			d.Spec.Template.Spec.Containers[0].Ports[0].Name = "https"
			if tt.annotation != "" {
				metav1.SetMetaDataAnnotation(&d.Spec.Template.ObjectMeta, agentcfg.AnnotationTLS, tt.annotation)
			}
			r.must(r.kc.Update(t.Context(), d))
			st, _ := r.look("in-1")
			if (st.State == v1alpha1.InterceptFailed) != (tt.reason != "") || st.Reason != tt.reason {
				t.Fatalf("%+v", st)
			}
			for _, w := range tt.words {
				if !strings.Contains(st.Message, w) {
					t.Errorf("%q does not say %q", st.Message, w)
				}
			}
		})
	}
}

// What an agent tells of a port stands in the status of intercepts by request, while it is connected.
func TestNotes(t *testing.T) {
	w := newWorld(t, webPods()...)
	a := w.agent("web-1")
	note := control.Note{Port: control.Port{Protocol: "TCP", Number: 8080}, Text: "TLS goes to the app"}
	if err := tunnel.Control(t.Context(), a.Session, control.AgentNote, note, nil); err != nil {
		t.Fatal(err)
	}
	if got := w.agents.noteOn(web, tcp(8080)); got != note.Text {
		t.Errorf("%q", got)
	}
	if got := w.agents.noteOn(web, tcp(9090)) + w.agents.noteOn(workloadKey{"shop", "Deployment", "db"}, tcp(8080)); got != "" {
		t.Errorf("of others: %q", got)
	}
	if err := tunnel.Control(t.Context(), a.Session, "agent/other", note, nil); err == nil {
		t.Error("another method was taken")
	}
	// An agent is whatever runs in a pod.
	taken := 0
	for port := range uint16(1000) {
		if tunnel.Control(t.Context(), a.Session, control.AgentNote, control.Note{Port: control.Port{Protocol: "UDP", Number: port}, Text: strings.Repeat("\u00e9", 20_000)}, nil) == nil {
			taken++
		}
	}
	if got := w.agents.noteOn(web, []control.Port{{Protocol: "UDP", Number: 1}}); taken != maxNotes-1 || len(got) > maxNote || !utf8.ValidString(got) {
		t.Errorf("%d notes are kept, one of them of %d bytes", taken+1, len(got))
	}
	for _, p := range []control.Port{{Protocol: strings.Repeat("x", 1000), Number: 8080}, {}} {
		if err := tunnel.Control(t.Context(), a.Session, control.AgentNote, control.Note{Port: p, Text: "x"}, nil); err == nil {
			t.Errorf("a note on port %.10q was taken", p.Protocol)
		}
	}
	if got := w.agents.noteOn(web, tcp(8080)); got != note.Text {
		t.Errorf("then: %q", got)
	}
	_ = a.Close()
	w.until("the note is forgotten", func() bool { return w.agents.noteOn(web, tcp(8080)) == "" })
}
