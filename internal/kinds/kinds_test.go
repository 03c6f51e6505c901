package kinds

import (
	"encoding/json"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/doppel-dev/doppel/internal/agentcfg"
)

func TestParse(t *testing.T) {
	for s, want := range map[string][2]string{
		"web": {"", "web"}, "deploy/web": {Deployment, "web"}, "StatefulSet/db": {StatefulSet, "db"}, "ds/logs": {DaemonSet, "logs"},
		"rs/x": {ReplicaSet, "x"}, "pods/x": {Pod, "x"}, "job/x": {Job, "x"}, "cj/x": {CronJob, "x"},
	} {
		if kind, name, err := Parse(s); err != nil || kind != want[0] || name != want[1] {
			t.Errorf("%q is %q %q, %v", s, kind, name, err)
		}
	}
	for _, s := range []string{"rocket/x", "deploy/", "/x"} {
		if kind, name, err := Parse(s); err == nil {
			t.Errorf("%q is %q %q", s, kind, name)
		}
	}
	for word, kind := range names {
		if New(kind) == nil {
			t.Errorf("%s is the kind %s, of which there is no object", word, kind)
		}
	}
}

// A pod that was made again for an agent is judged by what it was, whose ports are not the agent's.
func TestOriginalPod(t *testing.T) {
	was := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "alone"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}}}
	b, err := json.Marshal(was)
	if err != nil {
		t.Fatal(err)
	}
	is := was.DeepCopy()
	is.Annotations = map[string]string{agentcfg.AnnotationOriginal: string(b)}
	is.Spec.Containers = append(is.Spec.Containers, corev1.Container{Name: agentcfg.Container})
	for _, p := range []*corev1.Pod{&was, is} {
		if i, ok := Of(p); !ok || len(i.Template.Spec.Containers) != 1 || i.How != ByCreation {
			t.Errorf("%+v", i)
		}
	}
}
