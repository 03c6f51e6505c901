package inject

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func TestTLSReason(t *testing.T) {
	https := "https"
	for name, tt := range map[string]struct {
		port    corev1.ContainerPort
		service corev1.ServicePort
		probe   *corev1.Probe
		want    string
	}{
		"plain":                       {corev1.ContainerPort{Name: "http", ContainerPort: 8080}, corev1.ServicePort{Name: "http"}, nil, ""},
		"by the service's protocol":   {corev1.ContainerPort{Name: "web", ContainerPort: 8080}, corev1.ServicePort{AppProtocol: &https}, nil, "appProtocol https of service web"},
		"by the service port's name":  {corev1.ContainerPort{Name: "web", ContainerPort: 8080}, corev1.ServicePort{Name: "https-web"}, nil, "the name https-web of the port of service web"},
		"by its own name":             {corev1.ContainerPort{Name: "https", ContainerPort: 8080}, corev1.ServicePort{}, nil, "its name https"},
		"a name that only begins so":  {corev1.ContainerPort{Name: "httpsd", ContainerPort: 8080}, corev1.ServicePort{}, nil, ""},
		"by a probe":                  {corev1.ContainerPort{Name: "web", ContainerPort: 8080}, corev1.ServicePort{}, &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Scheme: "HTTPS", Port: intstr.FromString("web")}}}, "a probe of it with scheme HTTPS"},
		"by a probe of another port":  {corev1.ContainerPort{Name: "web", ContainerPort: 8080}, corev1.ServicePort{}, &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Scheme: "HTTPS", Port: intstr.FromInt32(9090)}}}, ""},
		"a probe that speaks no TLS ": {corev1.ContainerPort{Name: "web", ContainerPort: 8080}, corev1.ServicePort{}, &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Scheme: "HTTP", Port: intstr.FromInt32(8080)}}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			tt.service.Port, tt.service.TargetPort = 80, intstr.FromInt32(8080)
			f := Facts{Services: []corev1.Service{{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: corev1.ServiceSpec{
				ClusterIP: "10.96.0.1", Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{tt.service},
			}}}}
			spec := &corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Ports: []corev1.ContainerPort{tt.port}, ReadinessProbe: tt.probe}}}
			ports := Ports(spec, map[string]string{"app": "web"}, f)
			if len(ports) != 1 {
				t.Fatalf("ports %v", ports)
			}
			if got := TLSReason(spec, ports[0], f); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
